// Keeps the status page up to date: asks for it again, and changes what is different. Nothing is lost by that: neither
// the focus, nor what is selected, nor the place of who has it read out.
"use strict";
{
  const SECONDS = 2;
  const stale = document.getElementById("stale");
  const button = document.getElementById("pause");
  let paused = false;
  let timer;

  const fit = (old, fresh) => {
    if (old.nodeName !== fresh.nodeName) {
      old.replaceWith(document.importNode(fresh, true));
    } else if (old.nodeType === Node.ELEMENT_NODE) {
      fitAttributes(old, fresh);
      fitChildren(old, fresh);
    } else if (old.data !== fresh.data) {
      old.data = fresh.data;
    }
  };

  const fitAttributes = (old, fresh) => {
    for (const { name } of [...old.attributes]) {
      // Whether details are open is for who reads them to say.
      if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
    }
    for (const { name, value } of fresh.attributes) {
      if (old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
  };

  const fitChildren = (old, fresh) => {
    while (old.childNodes.length > fresh.childNodes.length) old.lastChild.remove();
    fresh.childNodes.forEach((child, at) => {
      if (at < old.childNodes.length) fit(old.childNodes[at], child);
      else old.append(document.importNode(child, true));
    });
  };

  const update = async () => {
    clearTimeout(timer);
    if (paused || document.hidden) return;
    try {
      const answer = await fetch(location.href, { signal: AbortSignal.timeout(10000) });
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const id of ["live", "figures"]) fit(document.getElementById(id), page.getElementById(id));
      if (document.title !== page.title) document.title = page.title;
      if (stale.textContent) stale.textContent = "";
    } catch {
      const words = "The daemon does not answer: these figures are old.";
      if (stale.textContent !== words) stale.textContent = words;
    }
    clearTimeout(timer);
    timer = setTimeout(update, 1000 * SECONDS);
  };

  button.hidden = false;
  button.addEventListener("click", () => {
    paused = !paused;
    button.textContent = paused ? "Go on" : "Pause";
    update();
  });
  document.addEventListener("visibilitychange", update);
  timer = setTimeout(update, 1000 * SECONDS);
}
