// The list of latents: sorting, filters, search. Its state is in the address, so that it can be sent to others.
"use strict";

(() => {
  const { el } = site;
  const PER_PAGE = 50;
  const DEFAULTS = { sort: "", dead: "all", token: "", text: "", selection: "", page: "1" };
  const SHOWN = ["density", "max", "skew", "top_token_share"];

  site.address = (state) => {
    const query = new URLSearchParams();
    for (const [name, value] of Object.entries(state)) if (value && value !== DEFAULTS[name]) query.set(name, value);
    const text = query.toString();
    return `#/latents${text ? `?${text}` : ""}`;
  };

  // "low..high" as numbers; an end that is left out is infinite.
  const rangeOf = (text) => {
    const [low, high] = text.split("..").map((part) => (part?.trim() ? Number(part) : NaN));
    return [Number.isNaN(low) ? -Infinity : low, Number.isNaN(high) || high === undefined ? Infinity : high];
  };

  // ------------------------------------------------------------------------------------------- which latents, in order

  // What a search found, by place in place of latent.
  const byPlace = async (found) => {
    const places = new Map();
    (await site.column("order")).forEach((latent, place) => found.has(latent) && places.set(place, found.get(latent)));
    return places;
  };

  // {places (in the default order, of the latents of the list), found (place -> number, of a search)}
  const compute = async (state) => {
    const { n_latents: n, columns } = site.value("about");
    let found = null;
    if (state.token) found = await site.findToken(state.token);
    if (state.text) {
      const texts = await site.findText(state.text);
      found = found ? new Map([...texts].filter(([latent]) => found.has(latent))) : texts;
    }
    if (found) found = await byPlace(found);
    let places = found ? [...found.keys()] : Array.from({ length: n }, (_, i) => i);
    if (state.selection) places = places.filter((place) => site.selection?.has(place));
    for (const name of columns) {
      if (!state[name]) continue;
      const [low, high] = rangeOf(state[name]);
      const values = await site.column(name);
      places = places.filter((place) => values[place] >= low && values[place] <= high);
    }
    if (state.dead !== "all") {
      const density = await site.column("density");
      places = places.filter((place) => (density[place] === 0) === (state.dead === "only"));
    }
    const [key, sign] = state.sort.startsWith("-") ? [state.sort.slice(1), -1] : [state.sort, 1];
    if (key && columns.includes(key)) {
      const values = await site.column(key);
      const rank = (place) => (Number.isNaN(values[place]) ? Infinity : sign * values[place]);
      places.sort((a, b) => (rank(a) === rank(b) ? a - b : rank(a) - rank(b)));
    } else if (key === "index") {
      const order = await site.column("order");
      places.sort((a, b) => sign * (order[a] - order[b]));
    } else if (found) {
      places.sort((a, b) => found.get(b) - found.get(a) || a - b);
    }
    return { places, found };
  };

  const isDefault = (state) => Object.keys(state).every((name) => !state[name] || state[name] === DEFAULTS[name]);

  // ----------------------------------------------------------------------------------------------------------- the rows

  const rowOf = ([latent, tokens, example, figures], extra) => {
    const context = example.length
      ? el("span", { class: "snippet", dir: "auto" }, site.visible(example[0]), /^ \S/u.test(example[1]) ? " " : "",
        el("mark", {}, site.visible(example[1].replace(/^ (?=\S)/u, ""))), site.visible(example[2]))
      : el("span", { class: "note" }, "never fires");
    return el("tr", {},
      el("th", { scope: "row" }, el("a", { href: `#/latent/${latent}` }, String(latent))),
      el("td", { class: "tokens" }, tokens.map((text) => site.chip(text))),
      el("td", { class: "example" }, context),
      figures.map((value, i) => el("td", { class: "figure", "data-name": site.figureName(SHOWN[i]) }, site.figureText(SHOWN[i], value))),
      extra === undefined ? null : el("td", { class: "figure", "data-name": extra[0] }, extra[1]));
  };

  // A table of rows. options: head (name, title) -> node, extra (number of the row -> [name, text]).
  site.rowTable = (rows, caption, { head = (name, title) => title, extra } = {}) => {
    const first = rows.length && extra ? extra(0)[0] : null;
    const figure = (name) => el("th", { scope: "col", class: "figure", title: site.FIGURES[name]?.[1] }, head(name, site.figureName(name)));
    return el("div", { class: "wide" }, el("table", { class: "rows" }, el("caption", { class: "unseen" }, caption),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, head("index", "latent")), el("th", { scope: "col" }, "top tokens"),
        el("th", { scope: "col" }, "strongest example"), SHOWN.map(figure), first ? el("th", { scope: "col", class: "figure" }, first) : null)),
      el("tbody", {}, rows.map((row, i) => rowOf(row, extra?.(i))))));
  };

  // ------------------------------------------------------------------------------------------------------- the controls

  const field = (label, input, hint) => {
    input.id = `field-${label.toLowerCase().replaceAll(/[^a-z]+/g, "-")}`;
    return el("div", { class: "field" }, el("label", { for: input.id, title: hint }, label), input);
  };
  const option = (value, text, chosen) => el("option", { value, selected: value === chosen }, text);

  const rangeField = (name, state, change, scale = 1) => {
    const [low, high] = state[name] ? rangeOf(state[name]) : [-Infinity, Infinity];
    const title = site.figureName(name) + (scale === 1 ? "" : " in %");
    const input = (end, value) => el("input", {
      type: "number", step: "any", value: Number.isFinite(value) ? String(Number((value * scale).toPrecision(6))) : "",
      placeholder: end, "aria-label": `${title}, ${end}`, onchange: () => set(),
    });
    const [from, to] = [input("from", low), input("to", high)];
    const set = () => {
      const part = (box) => (box.value === "" ? "" : String(Number(box.value) / scale));
      change({ [name]: from.value === "" && to.value === "" ? "" : `${part(from)}..${part(to)}` });
    };
    return el("div", { class: "field", role: "group", "aria-label": title }, el("span", { class: "label" }, title), el("span", { class: "range" }, from, "–", to));
  };

  const controls = (state, change) => {
    const { columns } = site.value("about");
    const text = (name, hint) =>
      el("input", { type: "search", value: state[name], placeholder: hint, autocomplete: "off", spellcheck: "false", onchange: (event) => change({ [name]: event.target.value }) });
    const [key, direction] = state.sort.startsWith("-") ? [state.sort.slice(1), "-"] : [state.sort, ""];
    const sort = el("select", { onchange: (event) => change({ sort: event.target.value && `${event.target.value === "index" ? "" : "-"}${event.target.value}` }) },
      option("", state.token || state.text ? "best match" : "clearest first", key), option("index", "number", key),
      columns.map((name) => option(name, site.figureName(name), key)));
    const turn = el("button", { type: "button", disabled: key === "", onclick: () => change({ sort: (direction ? "" : "-") + key }), "aria-label": direction ? "Descending; turn round" : "Ascending; turn round" }, direction ? "↓" : "↑");
    const dead = el("select", { onchange: (event) => change({ dead: event.target.value }) },
      option("all", "shown", state.dead), option("hide", "hidden", state.dead), option("only", "only these", state.dead));
    const others = columns.filter((name) => state[name] && !["density", "skew"].includes(name));
    return el("form", { class: "controls", role: "search", "aria-label": "Filter latents", onsubmit: (event) => event.preventDefault() },
      field("Top token", text("token", "a token"), "one of the ten tokens that have most of its activation"),
      field("Text of top examples", text("text", "words"), "words in one of its strongest examples"),
      rangeField("density", state, change, 100), rangeField("skew", state, change), others.map((name) => rangeField(name, state, change)),
      field("Dead latents", dead), el("div", { class: "with-button" }, field("Sort by", sort), turn),
      el("button", { type: "button", class: "clear", onclick: () => site.go("#/latents") }, "Clear"));
  };

  const pager = (state, n) => {
    const page = Number(state.page);
    const last = Math.max(1, Math.ceil(n / PER_PAGE));
    const link = (to, text, label) =>
      to < 1 || to > last ? el("span", { class: "off", "aria-hidden": "true" }, text)
        : el("a", { href: site.address({ ...state, page: String(to) }), "aria-label": label }, text);
    return el("nav", { class: "pager", "aria-label": "Pages of the list" }, link(1, "«", "First page"), link(page - 1, "‹ previous", "Previous page"),
      el("span", {}, `page ${site.number(page)} of ${site.number(last)}`), link(page + 1, "next ›", "Next page"), link(last, "»", "Last page"));
  };

  const heading = (state, n) => {
    const about = site.value("about");
    if (n === about.n_latents) return `${site.number(n)} latents`;
    return `${site.number(n)} of ${site.number(about.n_latents)} latents`;
  };

  const sortHead = (state) => (name, title) => {
    const isBy = state.sort.replace(/^-/, "") === name;
    const next = isBy ? (state.sort.startsWith("-") ? name : `-${name}`) : name === "index" ? name : `-${name}`;
    const button = el("a", { class: "sort", href: site.address({ ...state, sort: next, page: "" }) }, title, isBy ? (state.sort.startsWith("-") ? " ↓" : " ↑") : "");
    queueMicrotask(() => isBy && button.closest("th")?.setAttribute("aria-sort", state.sort.startsWith("-") ? "descending" : "ascending"));
    return button;
  };

  site.listPage = async (query) => {
    const about = site.value("about");
    const state = { ...DEFAULTS, ...Object.fromEntries(query) };
    state.page = String(Math.max(1, Math.floor(Number(state.page)) || 1));
    const isFirst = isDefault(state);
    const computed = isFirst ? null : await compute(state);
    const n = computed ? computed.places.length : about.n_latents;
    site.sequence = async () => {
      const order = await site.column("order");
      return (computed ?? (await compute(state))).places.map((place) => order[place]);
    };
    const start = (Number(state.page) - 1) * PER_PAGE;
    const shown = computed?.places.slice(start, start + PER_PAGE);
    const rows = shown ? await Promise.all(shown.map(site.row)) : about.first;
    const key = state.sort.replace(/^-/, "");
    let extra;
    if (about.columns.includes(key) && !SHOWN.includes(key)) {
      const values = await site.column(key);
      extra = (i) => [site.figureName(key), site.figureText(key, values[shown[i]])];
    } else if (computed?.found && !key) {
      const text = (found) => (state.text ? site.number(found) : site.percent(found));
      extra = (i) => [state.text ? "examples with it" : "share", text(computed.found.get(shown[i]))];
    }
    const change = (some) => site.go(site.address({ ...state, page: "", ...some }));
    site.say(heading(state, n));
    return el("div", {}, el("h1", { tabindex: "-1" }, heading(state, n)), controls(state, change),
      rows.length ? site.rowTable(rows, "Latents", { head: sortHead(state), extra }) : el("p", { class: "card" }, "No latent is like this. Clear a filter, or search for fewer words."),
      n > PER_PAGE ? pager(state, n) : null);
  };
})();
