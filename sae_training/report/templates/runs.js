// The table of runs, its filter, and the curves of the runs that are checked. What a reader chose is in the address.
// Names and values of runs enter the page as text only.
"use strict";

const MOST_CHECKED = 8; // at first: as many as there are colours
const N_FIELDS = 6; // of a config, as columns, until all are asked for
const COLOURS = {
  light: ["#2563eb", "#b45309", "#047857", "#dc2626", "#7c3aed", "#0e7490", "#be185d", "#4d7c0f"],
  dark: ["#60a5fa", "#fbbf24", "#34d399", "#f87171", "#a78bfa", "#22d3ee", "#f472b6", "#a3e635"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
const SWATCH = { solid: "", dash: "7 3", dot: "2 3", dashdot: "7 2 2 2" };

let data = null;
let state = null; // { filter, checked: Map of a run's name to the number of its look, across, sort, fields }
let poll = null;
let later = null;

const byId = (id) => document.getElementById(id);
const el = (tag, attributes, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
};
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const number = (value) => {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 1e4) return value.toLocaleString("en-US", { maximumFractionDigits: 0 });
  return size !== 0 && size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
};
const numeric = (text) => {
  const plain = String(text).replaceAll(",", "").replaceAll("_", "").trim();
  return plain !== "" && Number.isFinite(Number(plain)) ? Number(plain) : null;
};

// ------------------------------------------------------------------------------------------------------- the address

const read = () => {
  const found = new URLSearchParams(location.hash.slice(1));
  const words = (found.get("runs") ?? "").split(" ").filter(Boolean).map((word) => word.split("."));
  return {
    filter: found.get("filter") ?? "",
    checked: found.has("runs") ? new Map(words.map(([look, ...name]) => [decodeURIComponent(name.join(".")), Number(look) || 0])) : null,
    across: found.get("across") === "tokens" ? "tokens" : "step",
    sort: found.get("sort") ?? "name",
    fields: found.get("fields") === "all",
  };
};
const write = () => {
  const words = [...state.checked].map(([name, look]) => `${look}.${encodeURIComponent(name)}`);
  const kept = new URLSearchParams({ filter: state.filter, runs: words.join(" "), across: state.across, sort: state.sort });
  if (state.fields) kept.set("fields", "all");
  history.replaceState(null, "", `#${kept}`);
};
const change = (some) => {
  Object.assign(state, some);
  write();
  draw();
};
// The look of a run stays while it is checked: the first that no other one has.
const check = (name) => {
  const taken = new Set(state.checked.values());
  let look = 0;
  while (taken.has(look)) look += 1;
  state.checked.set(name, look);
};
const lookOf = (number) => ({
  colour: COLOURS[isDark() ? "dark" : "light"][number % 8],
  dash: DASHES[Math.floor(number / 8) % DASHES.length],
});

// -------------------------------------------------------------------------------------------------------- the filter

const COLUMNS = { name: (run) => run.name, state: (run) => run.state, step: (run) => run.step, updated: (run) => run.updated };
const valueOf = (run, field) => {
  const key = field.toLowerCase();
  if (key in COLUMNS) return COLUMNS[key](run);
  const figure = Object.keys(run.figures).find((name) => name.toLowerCase() === key);
  if (figure) return run.figures[figure];
  return run.config[field] ?? data.common[field];
};
const isField = (field) =>
  field.toLowerCase() in COLUMNS || data.fields.includes(field) || field in data.common ||
  data.runs.some((run) => Object.keys(run.figures).some((name) => name.toLowerCase() === field.toLowerCase()));

const unquoted = (text) => text.replace(/^"|"$/g, "");
// What of the filter asks for, as tests of a run; or the words that it holds and nobody understands.
const parsed = (filter) => {
  const tests = [];
  const unknown = [];
  for (const [word] of filter.matchAll(/[^\s"=!<>~]+\s*(?:!=|>=|<=|=|>|<|~)\s*(?:"[^"]*"?|[^\s"]*)|"[^"]*"?|\S+/g)) {
    const parts = /^([^\s"=!<>~]+)\s*(!=|>=|<=|=|>|<|~)\s*(.*)$/.exec(word);
    if (!parts) {
      const text = unquoted(word).toLowerCase();
      tests.push((run) => run.name.toLowerCase().includes(text));
      continue;
    }
    const [, field, sign, given] = parts;
    if (!isField(field)) unknown.push(field);
    else if (given !== "") tests.push(compare(field, sign, unquoted(given)));
  }
  return { tests, unknown };
};
const compare = (field, sign, given) => {
  const same = (value, wanted) =>
    numeric(value) !== null && numeric(wanted) !== null ? numeric(value) === numeric(wanted) : String(value).toLowerCase() === wanted.toLowerCase();
  const isOne = (value) => same(value, given) || given.split(",").some((part) => same(value, part));
  const limit = numeric(given);
  const tests = {
    "=": isOne,
    "!=": (value) => !isOne(value),
    "~": (value) => String(value).toLowerCase().includes(given.toLowerCase()),
    ">": (value) => numeric(value) > limit,
    "<": (value) => numeric(value) < limit,
    ">=": (value) => numeric(value) >= limit,
    "<=": (value) => numeric(value) <= limit,
  };
  const orders = "<>".includes(sign[0]);
  return (run) => {
    const value = valueOf(run, field);
    if (value === undefined || value === null) return sign === "!=";
    return (!orders || (limit !== null && numeric(value) !== null)) && tests[sign](value);
  };
};

// --------------------------------------------------------------------------------------------------------- the table

const shownRuns = () => {
  const { tests } = parsed(state.filter);
  const [key, turn] = state.sort.startsWith("-") ? [state.sort.slice(1), -1] : [state.sort, 1];
  const order = (a, b) => {
    const [x, y] = [valueOf(a, key), valueOf(b, key)];
    const empty = (value) => value === undefined || value === null;
    if (empty(x) || empty(y)) return empty(x) - empty(y);
    if (numeric(x) !== null && numeric(y) !== null) return turn * (numeric(x) - numeric(y));
    return turn * String(x).localeCompare(String(y), "en", { numeric: true });
  };
  return data.runs.filter((run) => tests.every((test) => test(run))).sort(order);
};

const swatch = (look) => {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "swatch");
  svg.setAttribute("viewBox", "0 0 26 8");
  svg.setAttribute("aria-hidden", "true");
  if (look === undefined) return svg;
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  const { colour, dash } = lookOf(look);
  for (const [name, value] of Object.entries({ d: "M0 4H26", stroke: colour, "stroke-width": 3, "stroke-dasharray": SWATCH[dash] })) line.setAttribute(name, value);
  svg.append(line);
  return svg;
};

const table = (runs) => {
  const figures = data.plots.filter((plot) => plot.table).map((plot) => plot.table);
  const fields = state.fields ? data.fields : data.fields.slice(0, N_FIELDS);
  const sortable = (key, title, isWords) => {
    const [by, turned] = [state.sort.replace(/^-/, ""), state.sort.startsWith("-")];
    const sign = by === key ? (turned ? " ↓" : " ↑") : "";
    return el("th", { scope: "col", class: isWords ? "words" : null, "aria-sort": by === key ? (turned ? "descending" : "ascending") : null },
      el("button", { type: "button", "data-key": `sort ${key}`, onclick: () => change({ sort: by === key && !turned ? `-${key}` : key }) }, title + sign));
  };
  const all = runs.length > 0 && runs.every((run) => state.checked.has(run.name));
  const checkAll = el("input", { type: "checkbox", "data-key": "check all", "aria-label": "Check all runs shown", onchange: (event) => {
    for (const run of runs) if (!event.target.checked) state.checked.delete(run.name);
      else if (!state.checked.has(run.name)) check(run.name);
    change({});
  } });
  checkAll.checked = all;
  const head = el("tr", {}, el("th", { scope: "col", "aria-sort": state.sort.replace(/^-/, "") === "name" ? (state.sort === "name" ? "ascending" : "descending") : null },
    el("span", {}, checkAll, " ", sortable("name", `Run`).firstChild)),
    sortable("state", "state", true), sortable("step", "step"), figures.map((name) => sortable(name, name)),
    fields.map((name) => sortable(name, name)), sortable("updated", "written"));
  const rows = runs.map((run) => {
    const box = el("input", { type: "checkbox", "data-key": `check ${run.name}`, onchange: (event) => {
      if (event.target.checked) check(run.name);
      else state.checked.delete(run.name);
      change({});
    } });
    box.checked = state.checked.has(run.name);
    const by = (field) => {
      const value = run.config[field];
      if (value === undefined) return el("td", {}, "–");
      const asked = `${field}=${/[\s",]/.test(value) ? `"${value}"` : value}`;
      return el("td", {}, el("button", { type: "button", title: `Filter by ${asked}`, "data-key": `${field} ${run.name}`,
        onclick: () => { byId("filter").value = `${state.filter} ${asked}`.trim(); change({ filter: byId("filter").value }); } }, value));
    };
    const bad = run.problems.length || run.alerts.length || ["failed", "given up", "lost"].includes(run.state);
    return el("tr", {},
      el("th", { scope: "row" }, el("label", {}, box, swatch(state.checked.get(run.name)), run.name), run.report ? [" ", el("a", { href: run.report.split("/").map(encodeURIComponent).join("/"), "aria-label": `Page of ${run.name}` }, "page")] : null),
      el("td", { class: bad ? "words bad" : "words" }, run.state + (run.alerts.length ? `, ${run.alerts.length} alert${run.alerts.length > 1 ? "s" : ""}` : "") + (run.problems.length ? ", damaged" : "")),
      el("td", {}, run.total ? `${number(run.step)} of ${number(run.total)}` : number(run.step)),
      figures.map((name) => el("td", {}, number(run.figures[name]))), fields.map(by), el("td", {}, when(run.updated)));
  });
  return el("table", {}, el("thead", {}, head), el("tbody", {}, rows));
};
const when = (text) => {
  const date = new Date(text ?? NaN);
  if (Number.isNaN(date.getTime())) return "–";
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday ? date.toLocaleTimeString("en-GB") : `${date.toLocaleDateString("en-CA")} ${date.toLocaleTimeString("en-GB").slice(0, 5)}`;
};

// --------------------------------------------------------------------------------------------------------- the plots

const plots = (runs) => {
  const [text, grid] = isDark() ? ["#b6bfcc", "#2b3441"] : ["#374151", "#e5e7eb"];
  const drawn = data.plots.filter((plot) => runs.some((run) => plot.key in run.lines));
  const places = byId("plots");
  for (const plot of data.plots) {
    const id = `plot ${plot.key}`;
    let place = byId(id);
    if (!drawn.includes(plot)) {
      if (place) { Plotly.purge(place); place.closest("figure").remove(); }
      continue;
    }
    if (!place) {
      place = el("div", { id });
      const next = data.plots.slice(data.plots.indexOf(plot) + 1).map((later) => byId(`plot ${later.key}`)).find(Boolean);
      places.insertBefore(el("figure", { class: "plot" }, el("figcaption", {}, plot.title), place), next?.closest("figure") ?? null);
    }
    const values = [];
    const traces = runs.filter((run) => plot.key in run.lines).map((run) => {
      const [steps, y] = run.lines[plot.key];
      const { colour, dash } = lookOf(state.checked.get(run.name));
      for (const value of y) if (value !== null) values.push(value);
      const scale = state.across === "tokens" ? run.tokens_per_step ?? 1 : 1;
      return { x: scale === 1 ? steps : steps.map((step) => step * scale), y, name: run.name, mode: steps.length <= 30 ? "lines+markers" : "lines",
        line: { color: colour, width: 1.8, dash }, marker: { size: 5 }, hovertemplate: "%{y:.5g}" };
    });
    const above = values.filter((value) => value > 0);
    const least = (some) => some.reduce((a, b) => Math.min(a, b), Infinity);
    const [low, smallest, highest] = [least(values), least(above), -least(values.map((value) => -value))];
    const yaxis = { title: { text: plot.y_title, standoff: 6 }, exponentformat: "e", gridcolor: grid, zerolinecolor: grid, automargin: true, rangemode: low < 0 ? "normal" : "nonnegative" };
    if (plot.log_scale && low >= 0 && highest > 10 * smallest) Object.assign(yaxis, { type: "log", tickformat: "~g", dtick: highest > 1000 * smallest ? 1 : "D2" });
    if (plot.from_zero && low < 0 && highest > 0) yaxis.range = [0, 1.05 * highest];
    Plotly.react(place, traces, {
      height: 290, margin: { l: 64, r: 12, t: 12, b: 44 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: text }, modebar: { bgcolor: "rgba(0,0,0,0)", color: text, activecolor: text }, hovermode: "x unified", showlegend: false,
      hoverlabel: { namelength: -1, bgcolor: isDark() ? "#171d26" : "#ffffff", font: { color: text } }, uirevision: `${state.across} ${state.filter}`,
      xaxis: { title: { text: state.across === "tokens" ? "tokens" : "step", standoff: 4 }, rangemode: "tozero", tickformat: "~s", hoverformat: ",", gridcolor: grid, zerolinecolor: grid },
      yaxis,
    }, { displaylogo: false, responsive: true, modeBarButtons: PLOT_BUTTONS });
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", `${plot.title} by ${state.across} of ${traces.length} run${traces.length > 1 ? "s" : ""}; the last values are in the table`);
  }
};

// ---------------------------------------------------------------------------------------------------------- the page

const draw = () => {
  const runs = shownRuns();
  const { unknown } = parsed(state.filter);
  const lines = runs.filter((run) => state.checked.has(run.name));
  const key = document.activeElement?.getAttribute("data-key");
  const place = byId("runs");
  const [top, left] = [place.scrollTop, place.scrollLeft];
  place.replaceChildren(table(runs));
  place.scrollTo(left, top);
  if (key) place.querySelector(`[data-key=${JSON.stringify(key)}]`)?.focus({ preventScroll: true });
  byId("all-fields").hidden = data.fields.length <= N_FIELDS;
  const strange = unknown.length ? `No run has ${unknown.join(", ")}, expected a field of a config, ${Object.keys(COLUMNS).join(", ")} or a column. ` : "";
  const said = `${strange}${runs.length === data.runs.length ? `${runs.length} runs` : `${runs.length} of ${data.runs.length} runs`}, ${lines.length} drawn.`;
  if (byId("said").textContent !== said) byId("said").textContent = said;
  const told = runs.flatMap((run) => [
    ...run.problems.map((problem) => [run.name, problem]),
    ...run.alerts.map((alert) => [run.name, alert.step === undefined ? alert.message : `after step ${number(alert.step)}, ${alert.message}`]),
  ]);
  byId("told").replaceChildren(...(told.length ? [el("h2", {}, "Alerts and problems"), el("ul", { class: "told" }, told.map(([name, text]) => el("li", {}, el("strong", {}, name), `: ${text}`)))] : []));
  clearTimeout(later); // many lines take seconds, and a filter is typed letter by letter
  later = setTimeout(() => plots(lines), 60);
};

const freshness = () => {
  const at = when(new Date(1000 * data.written).toISOString());
  const age = Date.now() / 1000 - data.written;
  const isKept = data.every_s !== null && age < 60 + 3 * data.every_s;
  const said = isKept ? `Written at ${at}, kept fresh every ${data.every_s} s` : `Written at ${at}. To keep it fresh: ${data.how}`;
  if (byId("fresh").textContent !== said) byId("fresh").textContent = said;
};

const load = () => {
  const script = el("script", { src: `${DATA_FILE}?${Date.now()}`, charset: "utf-8" });
  script.onload = script.onerror = () => { script.remove(); freshness(); };
  document.head.append(script);
};

// Called with the data that the page holds, and by the script beside it with newer ones.
function showRuns(newest) {
  const isNew = data === null || newest.stamp !== data.stamp;
  const first = data === null;
  data = newest;
  if (first) start();
  if (isNew) draw();
  freshness();
  if (data.every_s === null) { clearInterval(poll); poll = null; }
  else if (poll === null) { poll = setInterval(load, 1000 * data.every_s); load(); }
}

function start() {
  const begin = () => {
    state = read();
    if (state.checked === null) {
      state.checked = new Map();
      const newest = [...data.runs].sort((a, b) => String(b.updated ?? "").localeCompare(String(a.updated ?? ""))).slice(0, MOST_CHECKED);
      for (const run of data.runs) if (newest.includes(run)) check(run.name);
    }
    byId("filter").value = state.filter;
    byId("across").value = state.across;
    byId("every-field").checked = state.fields;
  };
  begin();
  byId("filter").addEventListener("input", (event) => change({ filter: event.target.value }));
  byId("across").addEventListener("change", (event) => change({ across: event.target.value }));
  byId("every-field").addEventListener("change", (event) => change({ fields: event.target.checked }));
  document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", () => { begin(); draw(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
