// The buttons of the pages of the cache's contents: each asks first, then shows how far the daemon is.
"use strict";
{
  const work = document.getElementById("work");
  const dialog = document.getElementById("doing");
  const [asked, explained, progress, told, go, leave] = ["asked", "explained", "progress", "told", "do", "leave"].map(
    (id) => document.getElementById(id),
  );
  let stop = null;
  let changed = false;
  let purged = false;

  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
  const size = (count) => {
    let unit = 0;
    for (; count >= 1023.5 && unit < 4; unit++) count /= 1024;
    return `${count.toFixed(unit && count < 10 ? 1 : 0)} ${UNITS[unit]}`;
  };
  const many = (count, one, several) => `${count.toLocaleString("en")} ${count === 1 ? one : several}`;
  const add = (sum, told) => {
    for (const [name, count] of Object.entries(told)) if (Number.isFinite(count)) sum[name] = (sum[name] ?? 0) + count;
  };

  const WORKS = {
    prefetch: {
      ask: (what) => `Prefetch ${what}?`,
      explain: ({ platforms }) =>
        `The daemon fetches what it lacks of the image, for ${platforms.length ? platforms.join(", ") : "all platforms"}.`,
      go: "Prefetch",
      told: (sum) =>
        `${many(sum.manifests ?? 0, "manifest", "manifests")} and ${many(sum.blobs ?? 0, "blob", "blobs")} are in the cache,` +
        ` ${size(sum.fetched ?? 0)} fetched` +
        (sum.missing ? `; ${sum.missing} failed` : ""),
      of: (sum) => [sum.there ?? 0, sum.of ?? 0],
      whole: true,
    },
    purge: {
      ask: (what) => `Purge ${what}?`,
      explain: () =>
        "It is removed from the cache, except for content that others share. Pulls in progress are not broken off." +
        " The next pull fetches it again.",
      go: "Purge",
      told: (sum) =>
        `${many(sum.entries ?? 0, "entry", "entries")} and ${many(sum.files ?? 0, "file", "files")} removed,` +
        ` ${size(sum.bytes ?? 0)}` +
        (sum.stuck ? `; ${many(sum.stuck, "file", "files")} can't be removed: the daemon's log says why` : ""),
    },
    verify: {
      ask: (what) => `Verify ${what}?`,
      explain: () => "Each file is read and compared with its digest. Corrupt ones are removed, and fetched again by the next pull.",
      go: "Verify",
      told: (sum) =>
        `${many(sum.good ?? 0, "file is", "files are")} good, ${sum.bad ?? 0} corrupt; ${size(sum.hashed ?? 0)} read`,
      of: (sum) => [sum.hashed ?? 0, sum.of ?? 0],
    },
  };

  const lines = async function* (answer) {
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) {
      const found = (rest + value).split("\n");
      rest = found.pop();
      for (const line of found) yield JSON.parse(line);
    }
  };

  const refusal = async (answer) => {
    try {
      return (await answer.json()).errors[0].message;
    } catch {
      return `the daemon answered ${answer.status}`;
    }
  };

  const show = (way, sum) => {
    told.textContent = way.told(sum);
    const [done, whole] = way.of ? way.of(sum) : [0, 0];
    if (whole) [progress.max, progress.value] = [whole, Math.min(done, whole)];
  };

  const run = async (name, about) => {
    const way = WORKS[name];
    const sum = {};
    stop = new AbortController();
    [go.hidden, progress.hidden, leave.textContent, changed] = [true, false, "Stop", true];
    progress.removeAttribute("value");
    leave.focus();
    let words = "";
    try {
      const answer = await fetch(`api/${name}`, {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Ecrproxy-Api": "1" },
        body: JSON.stringify(about),
        signal: stop.signal,
      });
      if (!answer.ok) throw new Error(await refusal(answer));
      let last = 0;
      for await (const each of lines(answer)) {
        if (each.problem && (!way.whole || each.over)) {
          Object.assign(sum, way.whole ? each : {});
          throw new Error(each.problem);
        }
        if (way.whole) Object.assign(sum, each);
        else if (each.verdict) add(sum, each.verdict === "good" ? { good: 1 } : each.verdict === "gone" ? {} : { bad: 1 });
        else add(sum, each);
        if (performance.now() - last > 250) {
          last = performance.now();
          show(way, sum);
        }
      }
      show(way, sum);
      words = `Done: ${way.told(sum)}.`;
      purged = purged || name === "purge";
    } catch (problem) {
      const so = Object.keys(sum).length ? `, after ${way.told(sum)}` : "";
      words = problem.name === "AbortError" ? `Stopped${so}.` : `Failed: ${problem.message}${so}.`;
    }
    stop = null;
    [told.textContent, progress.hidden, leave.textContent] = [words, true, "Close"];
    leave.focus();
  };

  const aboutThis = () => {
    const { registry, repository, reference } = work.dataset;
    return { registry, ...(repository && { repository }), ...(reference && { reference }) };
  };

  // What to prefetch: of a registry's page repository:tag is given, of a repository's page a tag or digest.
  const aboutFetched = (about) => {
    const [wanted, platforms] = ["wanted", "platforms"].map((id) => document.getElementById(id)?.value.trim() ?? "");
    about.platforms = platforms.split(/[\s,]+/).filter(Boolean);
    if (about.repository && wanted) {
      about.reference = wanted.replace(/^[:@]/, "");
    } else if (!about.repository) {
      const [, repository, , reference] = wanted.match(/^([^:@]+)([:@](.+))?$/) ?? [];
      Object.assign(about, { repository, reference: reference ?? "latest" });
    }
    const { repository, reference } = about;
    return reference ? `${repository}${reference.includes(":") ? "@" : ":"}${reference}` : "";
  };

  const open = (name) => {
    const way = WORKS[name];
    const about = aboutThis();
    const what = name === "prefetch" ? aboutFetched(about) : work.dataset.what;
    if (!what || !about.registry || (name === "prefetch" && !about.repository)) {
      document.getElementById("wanted").focus();
      return;
    }
    asked.textContent = way.ask(what);
    explained.textContent = way.explain(about);
    [told.textContent, go.textContent, leave.textContent] = ["", way.go, "Cancel"];
    [go.hidden, progress.hidden] = [false, true];
    go.onclick = () => run(name, about);
    dialog.showModal();
    leave.focus();
  };

  const close = () => {
    if (stop) stop.abort();
    else dialog.close();
  };

  if (work) {
    work.hidden = false;
    for (const button of work.querySelectorAll("button")) {
      button.addEventListener("click", () => open(button.dataset.work));
    }
    leave.addEventListener("click", close);
    dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      close();
    });
    dialog.addEventListener("close", () => {
      const { registry, repository, reference } = work.dataset;
      if (purged && reference) location.assign(`contents?${new URLSearchParams({ registry, repository })}`);
      else if (changed) location.reload();
    });
  }
}
