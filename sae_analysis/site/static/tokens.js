// Tokens coloured by activation, and what is known of one of them under the pointer or the keys.
"use strict";

(() => {
  const { el } = site;
  const facts = new WeakMap();
  let tip = null;

  // Nodes for a token: a span, and before it its space, so that lines break there. `fact`: {text, position, activation, share (of the latent's maximum), isExample, isFirst}.
  site.token = (fact) => {
    const fires = fact.activation > 0;
    const hasSpace = /^ \S/u.test(fact.text);
    const shown = fact.text === "" ? (fires ? "‥" : "") : site.visible(hasSpace ? fact.text.slice(1) : fact.text);
    const kinds = ["tok", fires && "fires", fact.isExample && "example"].filter(Boolean).join(" ");
    const span = el("span", { class: kinds }, shown);
    if (fires) span.style.setProperty("--heat", `${Math.round(12 + 88 * Math.min(1, fact.share))}%`);
    facts.set(span, fact);
    return hasSpace && !fact.isFirst ? [" ", span] : [span];
  };

  const moved = (logits, activation) =>
    ["top", "bottom"].map((side) =>
      el("div", { class: "moved" }, side === "top" ? "raises " : "lowers ",
        logits[side].slice(0, 5).map(([text, value]) => [site.chip(text), `${site.number(value * activation)} `]))
    );

  // What is predicted after the token where the latent is ablated.
  const without = ([loss, raised, lowered]) => {
    const side = (title, pairs) =>
      pairs.length ? el("div", { class: "moved" }, title, pairs.map(([text, value]) => [site.chip(text), `${site.number(value, 2)} `])) : null;
    return [
      loss === null ? null : el("div", {}, "without it: next token's loss ", el("b", {}, `${loss > 0 ? "+" : ""}${site.number(loss)}`)),
      side("likelier without it ", raised), side("less likely ", lowered),
    ];
  };

  const contentOf = (fact, record) => [
    el("div", { class: "tip-token" }, site.chip(fact.text), el("span", { class: "note" }, `position ${fact.position}`)),
    el("div", {}, fact.activation > 0
      ? ["activation ", el("b", {}, site.number(fact.activation)), ` · ${site.percent(fact.share)} of its maximum`]
      : fact.unknown ? "activation not kept so far from the example" : "does not fire here"),
    fact.activation > 0 && record.logits ? moved(record.logits, fact.activation) : null,
    fact.effect ? without(fact.effect) : null,
  ];

  const show = (span, record) => {
    hide();
    const fact = facts.get(span);
    tip = el("div", { id: "tip", role: "tooltip" }, contentOf(fact, record));
    document.getElementById("main").append(tip);
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8));
    const above = box.top - tip.offsetHeight - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 6}px`;
  };
  const hide = () => {
    tip?.remove();
    tip = null;
  };
  site.hideTip = hide;
  addEventListener("scroll", hide, { passive: true, capture: true });
  addEventListener("keydown", (event) => event.key === "Escape" && hide());

  const spoken = (fact) =>
    `${site.plain(fact.text)}: ${fact.activation > 0 ? `activation ${site.number(fact.activation)}` : "does not fire"}`;

  // Lets pointer and arrow keys walk over the tokens of a line.
  site.walkable = (line, record) => {
    let cursor = null;
    const put = (span) => {
      cursor?.classList.remove("cursor");
      cursor = span;
      cursor?.classList.add("cursor");
    };
    line.addEventListener("pointerover", (event) => {
      const span = event.target.closest(".tok");
      if (span && line.contains(span)) show(span, record);
    });
    line.addEventListener("pointerleave", hide);
    line.addEventListener("focus", () => line.matches(":focus-visible") && put(line.querySelector(".tok.example")));
    line.addEventListener("blur", () => {
      put(null);
      hide();
    });
    line.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      event.stopPropagation();
      const spans = [...line.querySelectorAll(".tok")];
      const at = spans.indexOf(cursor ?? line.querySelector(".tok.example"));
      const next = spans[Math.max(0, Math.min(spans.length - 1, at + step))];
      put(next);
      show(next, record);
      site.say(spoken(facts.get(next)));
    });
    return line;
  };
})();
