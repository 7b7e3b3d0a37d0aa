"""
The pages of what the cache has, by registry, repository and image: in the template C{contents.xml}. Pure.

Rules: those of L{page}. These pages do not refresh by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlencode

from twisted.web.template import Flattenable, Tag, XMLString

from ecrproxy.admin.page import Filled, Values, many, part
from ecrproxy.admin.units import NONE, ago, clean, moment, short, size, stamp
from ecrproxy.askers import AskedFor
from ecrproxy.cache.cells import File, Move
from ecrproxy.cache.contents import HeldImage, HeldRepository, ImagePart
from ecrproxy.cache.repository_rows import Weight
from ecrproxy.identity import RegistryId, Repository
from ecrproxy.oci import Kind
from ecrproxy.ranking import Saved

PATH: Final = "contents"
MOVES: Final = 20
"""Maximum number of a tag's moves that are shown."""
_KINDS: Final = {Kind.MANIFEST: "manifest", Kind.BLOB: "config or layer"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ContentsShown:
    """
    What a page shows, or C{None} and empty for what it does not have.

    @ivar when: now, in seconds since the epoch.
    @ivar registry: that of all that is shown; None for any.
    @ivar image: the tag or manifest that is shown.
    @ivar by_digest: True for a list of manifests in place of tags.
    @ivar total: the weight of all that is meant.
    @ivar repositories: a page of them, as are C{images}.
    @ivar parts: those of the image, with their files.
    @ivar left_out: number of parts that are not shown; None if it is unknown.
    @ivar first: True if this is the first page.
    @ivar next: the last item, if there are more.
    @ivar saved: the repository's bytes and answers from the cache since the start, if they are known.
    """

    when: float
    registry: RegistryId | None = None
    repository: Repository | None = None
    image: HeldImage | None = None
    by_digest: bool = False
    total: Weight | None = None
    repositories: Sequence[HeldRepository] = ()
    images: Sequence[HeldImage] = ()
    parts: Sequence[tuple[ImagePart, File | None]] = ()
    left_out: int | None = 0
    askers: Sequence[AskedFor] = ()
    moves: Sequence[Move] = ()
    saved: Saved | None = None
    first: bool = True
    next: Mapping[str, str] = field(default_factory=dict)


class ContentsPage(Filled):
    """
    The page of a registry, a repository, an image, or of all repositories.
    """

    loader = XMLString(part("contents.xml"))

    def __init__(self, shown: ContentsShown) -> None:
        super().__init__(_values(shown), _rows(shown))


def address(
    registry: RegistryId | None = None, repository: Repository | None = None, reference: str = "", **more: str
) -> str:
    """
    Return the relative URL of a page.
    """
    if repository is not None:
        more = {"registry": str(repository.registry), "repository": repository.name, **more}
    elif registry is not None:
        more = {"registry": str(registry), **more}
    query = urlencode({**more, **({"image": reference} if reference else {})})
    return f"{PATH}?{query}" if query else PATH


def _link(words: str, target: str) -> Tag:
    return Tag("a", attributes={"href": target})(Tag("bdi")(words))


def _name(shown: ContentsShown) -> str:
    """
    Return the name of what is shown; of all, an empty one.
    """
    if shown.repository is None:
        return "" if shown.registry is None else shown.registry.host
    if shown.image is None:
        return shown.repository.name
    reference = shown.image.reference
    return f"{shown.repository.name}{'@' if ':' in reference else ':'}{reference}"


def _values(shown: ContentsShown) -> Values:
    name, repository, image = clean(_name(shown)), shown.repository, shown.image
    heading = short(name) or "What is in the cache"
    more = [] if shown.left_out == 0 else ["More parts than these are not shown."]
    return {
        "title": f"{heading} - ecrproxy",
        "heading": Tag("bdi")(heading),
        "stamp": stamp(shown.when),
        "moment": moment(shown.when),
        "images": "Manifests by digest" if shown.by_digest else "Tags",
        "further": f"{shown.left_out:,} more are not shown." if shown.left_out else " ".join(more),
        "about_work": _about_work(shown),
        "work_registry": str(shown.registry or ""),
        "work_repository": "" if repository is None else repository.name,
        "work_reference": "" if image is None else image.reference,
        "work_what": _whole_name(shown, name),
    }


def _whole_name(shown: ContentsShown, name: str) -> str:
    """
    Return the name that the questions show: other registries may have repositories of the same name.
    """
    return name if shown.registry is None or shown.repository is None else f"{clean(shown.registry.host)}/{name}"


def _about_work(shown: ContentsShown) -> str:
    what = "all repositories of the registry" if shown.repository is None else "the repository"
    what = "the image" if shown.image is not None else what
    return (
        "Prefetch fetches an image as a client would."
        " Verify compares the cached files with their digests, and removes corrupt ones."
        f" Purge removes {what} from the cache, except for content that others share; the next pull fetches it again."
    )


def _rows(shown: ContentsShown) -> Mapping[str, Sequence[Values]]:
    repository, listed = shown.repository, shown.repositories or shown.images or shown.parts
    return {
        "trail": [{"link": each} for each in _trail(shown)],
        "tiles": _tiles(shown),
        "work": [{}] if shown.registry is not None else [],
        "wanted": [_wanted(shown)] if shown.image is None else [],
        "repositories": [_repository(each, shown.when) for each in shown.repositories],
        "images": [_image(repository, each, shown.when) for each in shown.images] if repository is not None else [],
        "parts": [_part(repository, *each, shown.when) for each in shown.parts] if repository is not None else [],
        "nothing": [] if listed else [{"words": "Nothing of it is in the cache." if shown.first else "That was all."}],
        "alone": [{}] if repository is not None else [],
        "askers": [_asker(each, shown.when) for each in shown.askers],
        "moves": [_move(each, shown.when) for each in shown.moves[:MOVES]],
        "pages": [{"link": each} for each in _pages(shown)],
    }


def _trail(shown: ContentsShown) -> list[Flattenable]:
    found: list[Flattenable] = [_link("Status", "./")]
    if shown.registry is not None:
        found.append(_link("Cache", address()))
    if shown.repository is not None:
        found.append(_link(clean(shown.repository.registry.host), address(shown.repository.registry)))
    if shown.image is not None:
        found.append(
            _link(clean(shown.repository.name), address(repository=shown.repository)) if shown.repository else ""
        )
    return found


def _tiles(shown: ContentsShown) -> list[Values]:
    found: list[Values] = []
    weight = shown.image.weight if shown.image is not None else shown.total
    if weight is not None:
        more = "" if shown.image is None or shown.image.whole else "at least: it has more parts than are counted"
        found += [
            {"what": "Size in the cache", "figure": size(weight.bytes), "more": more},
            {"what": "Files", "figure": f"{weight.files:,}", "more": ""},
        ]
        if weight.used:
            found.append({"what": "Last use", "figure": ago(shown.when - weight.used), "more": ""})
    elif shown.repositories:
        bytes_listed = sum(each.weight.bytes for each in shown.repositories)
        found += [
            {"what": "Repositories listed", "figure": f"{len(shown.repositories):,}", "more": ""},
            {"what": "Their size", "figure": size(bytes_listed), "more": "shared content counts in each"},
        ]
    if shown.image is not None:
        confirmed = ago(shown.when - shown.image.confirmed)
        found.append({"what": "Confirmed by the registry", "figure": confirmed, "more": ""})
    elif shown.saved is not None:
        answers = many(shown.saved[2], "answer", "answers")
        found.append({"what": "Saved since the start", "figure": size(shown.saved[1]), "more": f"in {answers}"})
    return found


def _wanted(shown: ContentsShown) -> Values:
    """
    Return the field for what to prefetch: a registry's page needs an image's name, a repository's page a tag.
    """
    if shown.repository is None:
        return {"label": "Image", "example": "repository:tag"}
    return {"label": "Tag or digest", "example": "latest"}


def _weight(weight: Weight, when: float, *, whole: bool = True) -> Values:
    return {
        "files": f"{weight.files:,}{'' if whole else '+'}",
        "size": f"{size(weight.bytes)}{'' if whole else '+'}",
        "ago": ago(when - weight.used) if weight.used else NONE,
    }


def _repository(held: HeldRepository, when: float) -> Values:
    repository = held.repository
    return {
        "link": _link(clean(repository.name), address(repository=repository)),
        "host": _link(clean(repository.registry.host), address(repository.registry)),
        **_weight(held.weight, when),
    }


def _image(repository: Repository, image: HeldImage, when: float) -> Values:
    digests = " ".join(short(str(each.digest)) for each in image.roots)
    return {
        "link": _link(short(clean(image.reference)), address(repository=repository, reference=image.reference)),
        "digests": "" if ":" in image.reference else digests,
        "confirmed": ago(when - image.confirmed),
        **_weight(image.weight, when, whole=image.whole),
    }


def _part(repository: Repository, piece: ImagePart, file: File | None, when: float) -> Values:
    digest = str(piece.descriptor.digest)
    is_manifest = piece.kind is Kind.MANIFEST and file is not None
    return {
        "digest": digest,
        "short": _link(short(digest), address(repository=repository, reference=digest))
        if is_manifest
        else short(digest),
        "kind": _KINDS[piece.kind],
        "size": size(piece.descriptor.size),
        "cached": "no" if file is None else "yes",
        "level": "" if file is None else "ok",
        "ago": NONE if file is None else ago(when - file.used),
        "verified": NONE if file is None or file.verified is None else ago(when - file.verified),
    }


def _asker(asked: AskedFor, when: float) -> Values:
    return {
        "client": clean(asked.client),
        "reference": short(clean(asked.reference)),
        "times": f"{asked.times:,}",
        "ago": ago(when - asked.when),
    }


def _move(move: Move, when: float) -> Values:
    return {"before": short(str(move.before)), "after": short(str(move.after)), "ago": ago(when - move.seen)}


def _pages(shown: ContentsShown) -> list[Flattenable]:
    found: list[Flattenable] = [_link("Status", "./")]
    if shown.image is not None or shown.repository is None:
        here = {}
    else:
        here = {"by": "digest"} if shown.by_digest else {}
        other = {} if shown.by_digest else {"by": "digest"}
        words = "Tags" if shown.by_digest else "Manifests by digest"
        found.append(_link(words, address(shown.registry, shown.repository, **other)))
    if not shown.first:
        found.append(_link("First page", address(shown.registry, shown.repository, **here)))
    if shown.next:
        found.append(_link("Next page", address(shown.registry, shown.repository, **here, **shown.next)))
    return found
