"""
Selecting manifests of an index by platform: OCI image spec, "Image Index". Pure.

Images for a variant also run on higher ones: C{arm/v6} runs on C{arm/v7}. The highest that runs is selected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ecrproxy.documents import listed
from ecrproxy.oci import INDEX_TYPE, INDEX_TYPES, MANIFEST_TYPES, Descriptor

_MACHINES: Final = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm/v7",
    "armv6l": "arm/v6",
    "armv5tel": "arm/v5",
    "i386": "386",
    "i686": "386",
    "loongarch64": "loong64",
}
_PLAIN: Final = {"amd64": "v1", "arm64": "v8", "arm": "v7"}
"""The default variants."""
SHOWN: Final = 20
"""Maximum number of platforms of an index in an error message."""
LONGEST: Final = 50
"""Maximum characters of each platform there."""
_IMAGES: Final = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
"""What an image is called where artifacts are told apart: its config's type."""
_PLATFORM = re.compile(r"([a-z0-9_.-]+)/([a-z0-9_.-]+)(?:/([a-z0-9_.-]+))?", re.IGNORECASE)
_LEVEL = re.compile(r"v(\d{1,3})")


@dataclass(frozen=True, slots=True)
class Platform:
    """
    The operating system and architecture of an image.
    """

    system: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """
        Parse C{os/architecture[/variant]}; architectures may have the kernel's names.

        @raise ValueError: if the text is invalid.
        """
        found = _PLATFORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not a platform; give one such as linux/amd64 or linux/arm/v7")
        named = _MACHINES.get(found[2].lower(), found[2].lower()).partition("/")
        return cls(found[1].lower(), named[0], (found[3] or named[2]).lower())

    @classmethod
    def of_machine(cls, machine: str) -> Platform:
        """
        Return the platform that docker pulls on a machine that the kernel calls C{machine}.
        """
        return cls.parse(f"linux/{machine or 'unknown'}")

    @property
    def level(self) -> str:
        """
        The variant, or the default one.
        """
        return self.variant or _PLAIN.get(self.architecture, "")

    def __str__(self) -> str:
        return "/".join(part for part in (self.system, self.architecture, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Offer:
    """
    An item of an index.

    @ivar platform: None if the item has none, or it is "unknown".
    @ivar tells_none: True if the item has none: it may be for any platform.
    @ivar is_artifact: whether it is no image, but goes with one: a SOCI index has the platform of its image.
    """

    descriptor: Descriptor
    platform: Platform | None
    tells_none: bool = False
    is_artifact: bool = False

    @property
    def is_index(self) -> bool:
        """
        True for a nested index.
        """
        return self.descriptor.media_type in INDEX_TYPES

    @property
    def is_manifest(self) -> bool:
        """
        True for a manifest; the index of a BuildKit cache lists layers.
        """
        return self.descriptor.media_type in MANIFEST_TYPES


def offers(index: bytes, within: Platform | None = None) -> Iterator[Offer]:
    """
    Yield the items of an index.

    @param within: the platform of this index in its parent index, which is the default for its items.
    @raise ValueError: if it is not an index.
    """
    known = {str(descriptor.digest): descriptor for _, descriptor in listed(index, INDEX_TYPE)}
    for item in json.loads(index).get("manifests", []):
        descriptor = known.get(str(item.get("digest"))) if isinstance(item, dict) else None
        if descriptor is not None:
            told = isinstance(item.get("platform"), dict)
            platform = _platform(item["platform"]) if told else within
            artifact = item.get("artifactType") not in (None, "", *_IMAGES)
            yield Offer(descriptor, platform, tells_none=not told and within is None, is_artifact=artifact)


def _platform(item: Mapping[str, Any]) -> Platform | None:
    try:
        variant = f"/{item['variant']}" if item.get("variant") else ""
        platform = Platform.parse(f"{item.get('os')}/{item.get('architecture')}{variant}")
    except ValueError:
        return None
    # docker's builders mark attestations so: they are not images.
    return None if platform.system == "unknown" else platform


def may_hold(index: Offer, wanted: Collection[Platform]) -> bool:
    """
    Return True if a nested index may have something for one of the platforms.
    """
    platform = index.platform
    return not wanted or platform is None or any(_rank(platform, each) is not None for each in wanted)


def choose(offered: Collection[Offer], wanted: Collection[Platform]) -> Sequence[Descriptor]:
    """
    Choose the manifests for each of the platforms, an image and what goes with it; all of them if none is C{wanted}.

    If a platform has none, all manifests without a platform are selected: clients look into their configs.

    @raise ValueError: if a platform has none; the message lists the available ones.
    """
    if not wanted:
        return list(dict.fromkeys(each.descriptor for each in offered))
    chosen: dict[Descriptor, None] = {}
    told = [(each.descriptor, each.platform) for each in offered if each.platform is not None and not each.is_artifact]
    artifacts = [(each.descriptor, each.platform) for each in offered if each.platform is not None and each.is_artifact]
    telling_none = [each.descriptor for each in offered if each.tells_none]
    for platform in wanted:
        ranks = [(_rank(each, platform), descriptor) for descriptor, each in told]
        fitting = [(rank, descriptor) for rank, descriptor in ranks if rank is not None]
        if not fitting and telling_none:
            chosen.update(dict.fromkeys(telling_none))
            continue
        if not fitting:
            raise ValueError(f"not for {platform}; its platforms: {_listing(each for _, each in told)}")
        best = max(rank for rank, _ in fitting)
        chosen[next(descriptor for rank, descriptor in fitting if rank == best)] = None
        chosen.update(dict.fromkeys(each for each, its in artifacts if _rank(its, platform) == best))
    return list(chosen)


def _listing(platforms: Iterable[Platform]) -> str:
    """
    Format platforms as a line of bounded length: an index can list thousands.
    """
    names = list(dict.fromkeys(str(each) for each in platforms))
    shown = [name if len(name) <= LONGEST else f"{name[:LONGEST]}..." for name in names[:SHOWN]]
    left = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*shown, *left]) or "none"


def _rank(offered: Platform, wanted: Platform) -> int | None:
    """
    Return how well a platform fits, higher is better; None if it does not.
    """
    if (offered.system, offered.architecture) != (wanted.system, wanted.architecture):
        return None
    has, wants = _LEVEL.fullmatch(offered.level), _LEVEL.fullmatch(wanted.level)
    if has is None or wants is None:
        return 0 if offered.level == wanted.level else None
    return int(has[1]) if int(has[1]) <= int(wants[1]) else None
