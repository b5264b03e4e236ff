// Which page is shown: addresses, keys, and light or dark.
"use strict";

(() => {
  const { el } = site;
  const redraws = new Set();
  // Calls `draw` whenever colours change, for as long as its page is shown.
  site.onTheme = (draw) => redraws.add(draw);

  // ------------------------------------------------------------------------------------------------------------- colours

  const stored = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("theme", value);
      return localStorage.getItem("theme") ?? "auto";
    } catch {
      return "auto"; // a browser may keep nothing for pages from the file system
    }
  };
  const THEMES = { auto: ["◐", "as the system"], light: ["☀", "light"], dark: ["☾", "dark"] };
  const button = el("button", { class: "theme", type: "button" });
  const setTheme = (name) => {
    document.documentElement.dataset.theme = name;
    const [sign, text] = THEMES[name] ?? THEMES.auto;
    button.textContent = sign;
    button.setAttribute("aria-label", `Colours: ${text}`);
    button.title = `Colours: ${text}`;
    for (const draw of redraws) draw();
  };
  const turnTheme = () => {
    const names = Object.keys(THEMES);
    const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
    stored(next);
    setTheme(next);
  };
  button.addEventListener("click", turnTheme);
  setTheme(stored());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraws.forEach((draw) => draw()));

  // --------------------------------------------------------------------------------------------------------------- pages

  site.go = (address) => {
    if (location.hash === address) show();
    else location.hash = address;
  };
  site.sequence = null; // () -> latents of the list that a reader came from, in its order

  let current = null; // {latent, page} of the page of a latent
  let turn = 0;

  const neighboursOf = async (latent) => {
    const listed = site.sequence ? await site.sequence() : null;
    const at = listed ? listed.indexOf(latent) : -1;
    const n = site.value("about").n_latents;
    if (at >= 0) return { previous: listed[at - 1], next: listed[at + 1], text: `${site.number(at + 1)} of ${site.number(listed.length)} in the list` };
    return { previous: latent > 0 ? latent - 1 : undefined, next: latent + 1 < n ? latent + 1 : undefined, text: `of ${site.number(n)}` };
  };

  const latentPage = async (latent, query) => {
    const [record, around] = await Promise.all([site.record(latent), neighboursOf(latent)]);
    const address = (number) => `#/latent/${number}`;
    const step = (number, text, label, rel) => number === undefined ? el("span", { class: "off", "aria-hidden": "true" }, text) : el("a", { href: address(number), rel, "aria-label": label }, text);
    const head = el("nav", { class: "pager", "aria-label": "Latents before and after" },
      step(around.previous, "‹ previous", "Previous latent", "prev"), el("span", {}, around.text), step(around.next, "next ›", "Next latent", "next"));
    const onTab = (name) => {
      // The address follows the tab, without a new entry of the history.
      if (current?.latent === latent) history.replaceState(null, "", name === "top" ? address(latent) : `${address(latent)}?tab=${name}`);
    };
    const page = site.latentPage(record, { head, tab: query.get("tab") ?? "top", onTab, link: (number) => el("a", { href: address(number) }, String(number)) });
    return [page, { latent, page, around }];
  };

  const make = async (path, query) => {
    const parts = path.split("/").filter(Boolean);
    if (parts[0] === "latents") return [await site.listPage(query), null];
    if (parts[0] === "latent") {
      const latent = Number(parts[1]);
      const n = site.value("about").n_latents;
      if (!Number.isInteger(latent) || latent < 0 || latent >= n) throw new Error(`Latent: found ${parts[1]}, expected 0 to ${n - 1}.`);
      return latentPage(latent, query);
    }
    return [await site.overviewPage(), null];
  };

  let isFirst = true;
  const show = async () => {
    if (location.hash && !location.hash.startsWith("#/")) return; // a place on the page
    const mine = ++turn;
    const [path, query] = (location.hash.slice(1) || "/").split("?");
    const main = document.getElementById("main");
    redraws.clear();
    site.hideTip();
    let page;
    let next = null;
    try {
      [page, next] = await make(path, new URLSearchParams(query));
    } catch (error) {
      page = el("div", {}, el("h1", { tabindex: "-1" }, "Nothing to show"), site.failure(error));
    }
    if (mine !== turn) return;
    current = next;
    // A field that led here keeps the keys, though the page around it is new.
    const field = main.contains(document.activeElement) ? document.activeElement.id : "";
    main.replaceChildren(page);
    const title = page.querySelector("h1");
    document.title = `${title.textContent} – ${site.value("about").about.name}`;
    for (const link of document.querySelectorAll("#top nav a")) {
      const isHere = link.getAttribute("href") === `#${path}`;
      if (isHere) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    const again = field && document.getElementById(field);
    if (again) again.focus();
    else if (!isFirst) {
      title.focus({ preventScroll: true });
      scrollTo(0, 0);
    }
    isFirst = false;
  };

  // ---------------------------------------------------------------------------------------------------------------- keys

  const KEYS = [
    ["← →  or  p n", "latent before, latent after"], ["1 2 3 4", "top, quantile, random and silent examples"], ["e", "whole contexts"],
    ["o", "overview"], ["l", "list of latents"], ["/", "search"], ["g", "go to a latent by its number"], ["r", "a random latent"],
    ["t", "colours: as the system, light, dark"], ["?", "these keys"], ["arrow keys on an example", "walk over its tokens"],
  ];
  const help = el("dialog", { "aria-labelledby": "keys-title" }, el("h2", { id: "keys-title" }, "Keys"),
    el("dl", { class: "keys" }, KEYS.map(([keys, what]) => el("div", {}, el("dt", {}, el("kbd", {}, keys)), el("dd", {}, what)))),
    el("form", { method: "dialog" }, el("button", {}, "Close")));

  const random = () => site.go(`#/latent/${Math.floor(Math.random() * site.value("about").n_latents)}`);
  const search = async () => {
    if (!location.hash.startsWith("#/latents")) {
      location.hash = "#/latents";
      await show();
    }
    document.getElementById("field-top-token")?.focus();
  };
  const step = (side) => current?.around[side] !== undefined && site.go(`#/latent/${current.around[side]}`);
  const ACTIONS = {
    ArrowLeft: () => step("previous"), ArrowRight: () => step("next"), p: () => step("previous"), n: () => step("next"),
    e: () => current?.page.examples.widenAll(), o: () => site.go("#/"), l: () => site.go("#/latents"), "/": search,
    g: () => document.getElementById("number").focus(), r: random, t: turnTheme, "?": () => help.showModal(),
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    if (event.target.closest("input, select, textarea")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (/^[1-4]$/.test(event.key)) return void current?.page.examples.choose(site.TABS[event.key - 1]);
    const action = ACTIONS[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });

  // -------------------------------------------------------------------------------------------------------------- start

  const top = () => {
    const number = el("input", { id: "number", type: "number", min: "0", max: String(site.value("about").n_latents - 1), inputmode: "numeric", placeholder: "number" });
    const jump = el("form", { class: "jump", onsubmit: (event) => {
      event.preventDefault();
      if (number.value !== "") site.go(`#/latent/${number.value}`);
      number.blur();
    } }, el("label", { for: "number", class: "unseen" }, "Latent number"), number, el("button", {}, "Go"));
    return [
      el("nav", { "aria-label": "Pages" }, el("a", { href: "#/" }, "Overview"), el("a", { href: "#/latents" }, "Latents")),
      el("div", { class: "tools" }, jump, el("button", { type: "button", onclick: random }, "Random"), button,
        el("button", { type: "button", "aria-label": "Keys", title: "Keys", onclick: () => help.showModal() }, "?")),
    ];
  };
  site.start = () => {
    document.getElementById("top").append(...top());
    document.body.append(help);
    addEventListener("hashchange", show);
    show();
  };
})();
