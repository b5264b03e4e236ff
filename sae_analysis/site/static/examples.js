// The examples of a latent: tabs, bands of quantiles, and windows that grow to the whole context.
"use strict";

(() => {
  const { el } = site;
  const KEPT = 128; // tokens around an example within which the latent's other firings are stored
  const TABS = [
    ["top", "Top", (kind) => kind === "top"],
    ["quantile", "Quantiles", (kind) => kind.startsWith("quantile")],
    ["random", "Random", (kind) => kind === "random"],
    ["silent", "Not firing", (kind) => kind === "silent"],
  ];
  const WHAT = {
    top: "Where it fires most, at most one place of a context.",
    quantile: "Four random places of each fifth of its firings, by activation.",
    random: "Random places where it fires.",
    silent: "Random places of contexts in which it does not fire at all.",
  };
  site.TABS = TABS.map(([name]) => name);

  const parsed = (found) => {
    const [kind, context, position, hasContext, start, joined, firings] = found;
    const activations = new Map();
    for (let i = 0; i < firings.length; i += 2) activations.set(firings[i], firings[i + 1]);
    return {
      kind: site.value("about").kinds[kind], context, position, hasContext, start,
      texts: site.split(joined), activations, activation: activations.get(position) ?? 0,
    };
  };

  const tokensOf = (example, texts, start, record) =>
    texts.flatMap((text, i) => {
      const position = start + i;
      const activation = example.activations.get(position) ?? 0;
      return site.token({
        text, position, activation, isFirst: i === 0, share: activation / (record.figures.max || 1),
        isExample: position === example.position, effect: position === example.position ? example.effect : null, unknown: Math.abs(position - example.position) > KEPT,
      });
    });

  // Change of the loss of the next token where the latent is ablated, if that was measured.
  const loss = (effect) =>
    effect && effect[0] !== null ? el("div", { class: "loss", title: "change of the next token's loss without the latent, in nats" },
      `${effect[0] > 0 ? "+" : ""}${site.number(effect[0], 2)} loss`) : null;

  const exampleRow = (example, number, record) => {
    const name = example.activation > 0 ? `activation ${site.number(example.activation)}` : "does not fire";
    const line = el("div", {
      class: "text", tabindex: "0", role: "group", dir: "auto",
      "aria-label": `Example ${number}, ${name}; the arrow keys walk over its tokens`,
    });
    const narrow = () => line.replaceChildren(...tokensOf(example, example.texts, example.start, record));
    narrow();
    site.walkable(line, record);
    const item = el("li", { class: "one" },
      el("div", { class: "value", title: `context ${example.context}, position ${example.position}` },
        example.activation > 0 ? site.number(example.activation) : "0", loss(example.effect)), line);
    if (!example.hasContext) return item;
    const button = el("button", { class: "more", "aria-expanded": "false", "aria-label": `more: whole context of example ${number}` }, "more");
    item.widen = async (wide) => {
      try {
        if (wide) line.replaceChildren(...tokensOf(example, await site.context(example.context), 0, record));
        else narrow();
      } catch (error) {
        line.append(site.failure(error));
        return;
      }
      line.classList.toggle("whole", wide);
      button.setAttribute("aria-expanded", String(wide));
      button.textContent = wide ? "less" : "more";
      button.setAttribute("aria-label", `${button.textContent}: whole context of example ${number}`);
    };
    button.addEventListener("click", () => item.widen(button.getAttribute("aria-expanded") !== "true"));
    item.append(button);
    return item;
  };

  const band = (kind, examples) => {
    const values = examples.map((example) => example.activation);
    const number = Number(kind.split(" ")[1]);
    const text = `${20 * number} to ${20 * (number + 1)} % of its firings`;
    const range = `activations ${site.number(Math.min(...values))} to ${site.number(Math.max(...values))}`;
    return el("h3", {}, text, " ", el("span", { class: "note" }, range));
  };

  const panelOf = (name, examples, record) => {
    const content = [el("p", { class: "note" }, WHAT[name])];
    if (!examples.length) content.push(el("p", {}, name === "silent" ? "It fires in each of the contexts that were drawn for this (512 for all latents together)." : "None: it never fires."));
    let number = 0;
    for (const kind of new Set(examples.map((example) => example.kind))) {
      const some = examples.filter((example) => example.kind === kind);
      if (name === "quantile") content.push(band(kind, some));
      content.push(el("ol", { class: "examples" }, some.map((example) => exampleRow(example, ++number, record))));
    }
    return content;
  };

  const scale = (record) =>
    el("div", { class: "scale", role: "img", "aria-label": `Colours: from 0 to its maximum, ${site.number(record.figures.max)}` },
      el("span", {}, "0"), el("span", { class: "ramp" }), el("span", {}, site.number(record.figures.max)));

  // The part of a latent's page with its examples. `chosen`: the tab shown first; `onTab`: told which is chosen.
  site.examples = (record, chosen = "top", onTab = () => {}) => {
    const examples = record.examples.map(parsed);
    const strongest = examples.filter((example) => example.kind === "top");
    record.effects.forEach((effect, i) => strongest[i] && (strongest[i].effect = effect));
    const panel = el("div", { id: "examples-panel", role: "tabpanel", tabindex: "0" });
    const tabs = TABS.map(([name, title, isOf]) => {
      const count = examples.filter((example) => isOf(example.kind)).length;
      return el("button", {
        id: `tab-${name}`, role: "tab", "aria-controls": "examples-panel", onclick: () => choose(name),
      }, title, el("span", { class: "count" }, String(count)));
    });
    const choose = (name, focus = false) => {
      const at = Math.max(0, site.TABS.indexOf(name));
      tabs.forEach((tab, i) => {
        tab.setAttribute("aria-selected", String(i === at));
        tab.tabIndex = i === at ? 0 : -1;
      });
      if (focus) tabs[at].focus();
      panel.setAttribute("aria-labelledby", tabs[at].id);
      site.hideTip();
      panel.replaceChildren(...panelOf(TABS[at][0], examples.filter((example) => TABS[at][2](example.kind)), record));
      all.setAttribute("aria-pressed", "false");
      onTab(TABS[at][0]);
    };
    const list = el("div", { role: "tablist", "aria-label": "Kinds of examples" }, tabs);
    list.addEventListener("keydown", (event) => {
      const at = tabs.findIndex((tab) => tab.tabIndex === 0);
      const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      choose(site.TABS[(next + tabs.length) % tabs.length], true);
    });
    const all = el("button", { class: "all", "aria-pressed": "false", onclick: () => widenAll() }, "Whole contexts");
    const widenAll = () => {
      const wide = all.getAttribute("aria-pressed") !== "true";
      all.setAttribute("aria-pressed", String(wide));
      panel.querySelectorAll(".one").forEach((item) => item.widen?.(wide));
    };
    choose(chosen);
    const part = el("section", { class: "card examples-card", "aria-labelledby": "examples-title" },
      el("div", { class: "bar-of-tabs" }, el("h2", { id: "examples-title" }, "Examples"), list, scale(record), all), panel);
    part.choose = (name) => choose(name);
    part.widenAll = widenAll;
    return part;
  };
})();
