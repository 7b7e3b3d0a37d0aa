"""
The status page: a snapshot as HTML, in the template C{page.xml}. Pure.

Rules:

- Text that clients or upstream can choose is escaped by the template, and L{units.clean} has replaced unprintable
  characters.
- A browser without scripts shows the whole page, and reloads it regularly.
- Everything in it is served by this port, and all styles and scripts are separate files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, Final
from urllib.parse import quote

from twisted.web.template import Element, Flattenable, Tag, XMLString

from ecrproxy.admin.charts import ceiling, hit_chart, traffic_chart
from ecrproxy.admin.history import SCALES, Scale, merged, stretches
from ecrproxy.admin.snapshot import Clients, Leaving, RegistryState, Saving, Snapshot, Transfer
from ecrproxy.admin.units import NONE, ago, clean, hit_ratio, moment, rate, share, short, size, span, stamp, within
from ecrproxy.failures import Failed
from ecrproxy.ranking import SAVING

DOCTYPE: Final = b"<!DOCTYPE html>\n"
_CIRCUIT: Final = {"closed": "ok", "probing": "warn", "open": "bad"}
_BAR: Final = 100

Values = dict[str, Flattenable]


def part(name: str) -> bytes:
    """
    Read a file of this package.
    """
    return resources.files(__package__).joinpath(name).read_bytes()


class Filled(Element):
    """
    A template with its values and rows.

    In the template, C{values} fills in single values. A table row is named after what it lists, and is repeated for
    each item; C{with_} or C{without_} before that name marks elements shown only if there are items, or none.
    """

    def __init__(self, values: Values, rows: Mapping[str, Sequence[Values]]) -> None:
        super().__init__()
        self._values, self._rows = values, rows

    def lookupRenderMethod(self, name: str) -> Callable[[Any, Tag], Flattenable]:
        """
        Return the renderer of the template's part C{name}.
        """

        def fill(_: object, tag: Tag) -> Flattenable:
            if name == "values":
                return tag.fillSlots(**self._values)
            way, _, what = name.rpartition("_")
            if way:
                return tag if bool(self._rows[what]) is (way == "with") else ""
            return [tag.clone(deep=False).fillSlots(**row) for row in self._rows[what]]

        return fill


class Page(Filled):
    """
    The page of the daemon, or of one of its registries.

    @param whole: True for the page of the daemon.
    """

    loader = XMLString(part("page.xml"))

    def __init__(self, snapshot: Snapshot, *, whole: bool = True) -> None:
        super().__init__(values_of(snapshot), {**rows_of(snapshot), "whole": [{}] if whole else []})


def health(snapshot: Snapshot) -> tuple[str, str]:
    """
    Return the daemon's status as a level and a few words.
    """
    if not snapshot.can_serve:
        return "bad", "Not ready"
    lately = snapshot.lately
    failed = f"{many(lately.failed, 'request', 'requests')} failed in the last {-(-lately.seconds // 60)} min"
    if not snapshot.can_fetch:
        words = "Can't fetch from upstream, serves what is cached"
        return "warn", f"{words}; {failed}" if lately.failed else words
    return ("warn", f"Serves, but {failed}") if lately.failed else ("ok", "Ready")


def values_of(snapshot: Snapshot) -> Values:
    """
    Return the single values of the page.
    """
    level, words = health(snapshot)
    return {
        "title": f"ecrproxy: {words[0].lower()}{words[1:]}",
        "level": level,
        "health": words,
        "registry": clean(snapshot.registry.rpartition("://")[2]),
        "version": snapshot.version,
        "uptime": span(snapshot.uptime),
        "stamp": stamp(snapshot.when),
        "moment": moment(snapshot.when),
        "transfers": f"{len(snapshot.transfers)}",
        "followers": many(sum(each.followers for each in snapshot.transfers), "client", "clients"),
        **_daemon(snapshot.host, snapshot.clients),
        **_traffic(snapshot),
        **_cache(snapshot),
        **_ecr(snapshot),
    }


def _daemon(host: str, clients: Clients) -> Values:
    limit = "" if clients.limit is None else f" of {clients.limit:,}"
    return {
        "machine": clean(host),
        "processes": f"{clients.processes:,}",
        "connected": f"{clients.connected:,}{limit}",
        "being_sent": many(clients.sending, "answer", "answers"),
        "stall": f"{clients.stall * 1000:,.0f} ms",
    }


def _traffic(snapshot: Snapshot) -> Values:
    whole, now, top, scale = merged(snapshot.history), snapshot.now, ceiling(snapshot.history), snapshot.scale
    everything = sum(each.bytes for each in snapshot.answers.values())
    saved = sum(each.bytes for status, each in snapshot.answers.items() if status in SAVING)
    return {
        "reach": scale.words,
        "half_reach": span(scale.seconds / 2),
        "ratio": hit_ratio(whole),
        "asking": f"{(now.asked + now.failed) / now.seconds if now.seconds else 0:,.3g}/s",
        "requests": f"{whole.asked + whole.failed:,}",
        "failed": f"{whole.failed:,}",
        "failed_share": share(whole.failed, whole.asked + whole.failed),
        "failed_level": "bad" if whole.failed else "",
        "asked": f"{whole.asked:,}",
        "half_within": within(whole, 0.5),
        "most_within": within(whole, 0.99),
        "sent": size(whole.sent),
        "sending": rate(now.sent, now.seconds),
        "received": size(whole.received),
        "receiving": rate(now.received, now.seconds),
        "saved": size(saved),
        "saved_share": share(saved, everything),
        "hit_chart": hit_chart(snapshot.history, scale),
        "traffic_chart": traffic_chart(snapshot.history, scale),
        "ceiling": rate(top, 1),
        "half": rate(top // 2, 1),
    }


def _cache(snapshot: Snapshot) -> Values:
    cache = snapshot.cache
    filled = share(cache.bytes, cache.limit)
    meter = Tag("meter")(min="0", max=str(cache.limit), value=str(min(cache.bytes, cache.limit)))
    meter.attributes["aria-label"] = "Cache filled"
    return {
        "filled": filled,
        "meter": meter(filled),
        "used": size(cache.bytes),
        "reserved": size(cache.reserved),
        "limit": size(cache.limit),
        "files": f"{cache.files:,}",
        "evicted": f"{cache.evicted:,}",
    }


def _ecr(snapshot: Snapshot) -> Values:
    upstream, token = snapshot.upstream, snapshot.token
    answered, alone = upstream.answered_seconds, upstream.open_repositories
    level = _CIRCUIT[upstream.circuit] if snapshot.can_fetch or upstream.circuit != "closed" else ""
    return {
        "fetches": "yes" if snapshot.can_fetch else "no",
        "fetches_level": "ok" if snapshot.can_fetch else "bad",
        "circuit": upstream.circuit + (f", {many(alone, 'repository', 'repositories')} left alone" if alone else ""),
        "circuit_level": "warn" if alone and level == "ok" else level,
        "answered": "never yet" if answered is None else ago(answered),
        "retries": f"{upstream.retries:,}",
        "token_level": "bad" if token.problem else "ok",
        "token": clean(token.problem or "good"),
        "expires": NONE if token.expires is None else f"in {span(token.expires - snapshot.when)}",
        "refresh": f"in {span(token.refresh_seconds)}",
        "failures": f"{token.failures:,}",
    }


def rows_of(snapshot: Snapshot) -> Mapping[str, Sequence[Values]]:
    """
    Return the rows of the page's tables and lists, by name.
    """
    most = max((each.bytes for each in snapshot.repositories), default=0)
    upstream = snapshot.upstream
    return {
        "reasons": [{"reason": short(clean(each))} for each in snapshot.reasons],
        "stretches": _stretches(snapshot),
        "scales": [_scale(each, chosen=each == snapshot.scale) for each in SCALES],
        "registries": [_registry(each) for each in snapshot.registries] if len(snapshot.registries) > 1 else [],
        "transfers": [_transfer(each) for each in snapshot.transfers],
        "next": [_leaving(each, snapshot.when) for each in snapshot.cache.next],
        "repositories": [_saving(each, most) for each in snapshot.repositories],
        "waiting": [{"call": call, "count": f"{count:,}"} for call, count in upstream.waiting.items()],
        "outcomes": [_outcomes(host, outcomes) for host, outcomes in upstream.outcomes.items()],
        "answers": [
            {"status": status, "count": f"{each.count:,}", "bytes": size(each.bytes)}
            for status, each in sorted(snapshot.answers.items())
        ],
        "failures": [_failed(each, snapshot.when) for each in snapshot.failed],
        "incidents": [
            {
                "stamp": stamp(each.when),
                "ago": ago(snapshot.when - each.when),
                "level": each.level,
                "text": short(clean(each.text)),
                "times": f" ({each.times:,} times)" if each.times > 1 else "",
            }
            for each in snapshot.incidents
        ],
    }


def _failed(failed: Failed, when: float) -> Values:
    return {
        "stamp": stamp(failed.when),
        "ago": ago(when - failed.when),
        "path": short(clean(failed.path.removeprefix("/v2/"))),
        "status": f"{failed.status}",
        "reason": clean(failed.reason),
        "client": clean(failed.client),
        "times": f" ({failed.times:,} times)" if failed.times > 1 else "",
        "first": f"first {ago(when - failed.since)}" if failed.times > 1 else "",
    }


def _scale(scale: Scale, *, chosen: bool) -> Values:
    link = Tag("a")(scale.words, href=f"?range={scale.name}")
    if chosen:
        link.attributes["aria-current"] = "true"
    return {"link": link}


def _stretches(snapshot: Snapshot) -> list[Values]:
    rows: list[Values] = []
    passed = 0
    for point in stretches(snapshot.history, snapshot.scale.seconds // snapshot.scale.rows):
        rows.append(
            {
                "reach": span(passed + point.seconds),
                "asked": f"{point.asked:,}",
                "failed": f"{point.failed:,}",
                "ratio": hit_ratio(point),
                "sent": size(point.sent),
                "received": size(point.received),
            }
        )
        passed += point.seconds
    return rows


def _registry(state: RegistryState) -> Values:
    return {
        "its_name": clean(state.name),
        "its_link": f"?registry={quote(clean(state.name), safe='')}",
        "its_circuit": state.upstream.circuit,
        "its_circuit_level": _CIRCUIT[state.upstream.circuit],
        "its_token": short(clean(state.token.problem or "good")),
        "its_token_level": "bad" if state.token.problem else "ok",
        "its_errors": f"{state.errors:,}",
        "its_saved": size(state.saved),
    }


def _transfer(transfer: Transfer) -> Values:
    repository, received = clean(transfer.repository) or NONE, size(transfer.received)
    bar = Tag("progress")
    bar.attributes["aria-label"] = f"{repository} {short(transfer.digest)}"
    if transfer.size:
        bar.attributes |= {"max": str(transfer.size), "value": str(transfer.received)}
        progress = f"{share(transfer.received, transfer.size)} of {size(transfer.size)}"
    else:
        progress = f"{received} so far"
    return {
        "repository": repository,
        "digest": transfer.digest,
        "short": short(transfer.digest),
        "bar": bar(progress),
        "progress": progress if transfer.kept else f"{progress}, not kept",
        "followers": f"{transfer.followers:,}",
    }


def _leaving(leaving: Leaving, when: float) -> Values:
    name = clean(leaving.name)
    return {
        "name": name,
        "short": short(name),
        "kind": leaving.kind,
        "size": size(leaving.bytes),
        "ago": ago(when - leaving.used),
    }


def _saving(saving: Saving, most: int) -> Values:
    bar = Tag("svg")(class_="bar", viewBox=f"0 0 {_BAR} 1", preserveAspectRatio="none")
    bar.attributes["aria-hidden"] = "true"
    width = f"{_BAR * saving.bytes / most:.1f}" if most else "0"
    return {
        "repository": clean(saving.repository),
        "bar": bar(Tag("rect")(width=width, height="1")),
        "bytes": size(saving.bytes),
        "answers": f"{saving.answers:,}",
    }


def _outcomes(host: str, outcomes: Mapping[str, int]) -> Values:
    """
    Summarize the outcomes of requests to a kind of host, in four classes.
    """
    throttled = outcomes.get("429", 0)
    good = sum(count for outcome, count in outcomes.items() if outcome[0] in "123")
    refused = sum(count for outcome, count in outcomes.items() if outcome[0] == "4") - throttled
    return {
        "host": host,
        "good": f"{good:,}",
        "refused": f"{refused:,}",
        "throttled": f"{throttled:,}",
        "failed": f"{sum(outcomes.values()) - good - refused - throttled:,}",
    }


def many(count: int, one: str, several: str) -> str:
    """
    Format a number of things.
    """
    return f"{count:,} {one if count == 1 else several}"
