// The page of a latent.
"use strict";

(() => {
  const { el } = site;
  const FIRST = ["density", "count", "max", "mean", "skew", "kurtosis"];
  const REST = [
    "mean_all", "variance", "mean_position", "first", "last", "decoder_norm", "encoder_norm", "encoder_bias",
    "encoder_decoder_cosine", "logit_skew", "logit_kurtosis", "token_entropy", "top_token_share", "top_bigram_share",
  ];

  const card = (title, ...content) => {
    const id = `part-${title.toLowerCase().replaceAll(/[^a-z]+/g, "-")}`;
    return el("section", { class: "card", "aria-labelledby": id }, el("h2", { id }, title), ...content);
  };

  const facts = (record, names) =>
    el("dl", {}, names.filter((name) => name in record.figures).map((name) =>
      el("div", { title: site.FIGURES[name]?.[1] },
        el("dt", {}, site.figureName(name)), el("dd", {}, site.figureText(name, record.figures[name])))));

  const share = (value, most) => {
    const bar = el("span", { class: "share", "aria-hidden": "true" });
    bar.style.setProperty("--part", `${(100 * value) / (most || 1)}%`);
    return bar;
  };

  const unseen = (text) => el("span", { class: "unseen" }, text);

  const table = (caption, heads, rows) =>
    el("table", {}, el("caption", { class: "unseen" }, caption),
      el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
      el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell) => el("td", {}, cell))))));

  const histogram = (record) => {
    const { counts, edges } = record.histogram;
    const logs = edges.map(Math.log10);
    const marks = record.quantiles.filter(([q]) => q === 0.5).map(([, value]) => [Math.log10(value), `median ${site.number(value)}`]);
    return card("Activations",
      site.bars({
        counts, edges: logs, unit: "firings", marks, label: `Histogram of its activations, ${site.number(record.figures.count)} firings`,
        range: (low, high) => `${site.number(10 ** low)} to ${site.number(10 ** high)}`,
        ticks: counts.length ? site.logTicks(logs[0], logs[logs.length - 1]) : [],
      }),
      el("p", { class: "note" }, "Activation where it fires, in steps of a constant factor; the line is the median."));
  };

  const quantiles = (record) =>
    card("Quantiles", record.quantiles.length
      ? el("dl", { class: "thirds" }, record.quantiles.map(([q, value]) => el("div", {}, el("dt", {}, `${site.number(100 * q)} %`), el("dd", {}, site.number(value)))))
      : el("p", { class: "note" }, "It never fires."));

  const logits = (record) => {
    const { top, bottom, counts, edges } = record.logits;
    const side = (title, pairs) => table(title, [title, unseen("logit")], pairs.map(([text, value]) => [site.chip(text), site.number(value)]));
    const [low, high] = [edges[0], edges[edges.length - 1]];
    const all = counts.map((_, i) => low + ((high - low) * i) / counts.length).concat(high);
    return card("Logits",
      el("p", { class: "note" }, "What its direction, one unit of it, adds to the logits of next tokens."),
      el("div", { class: "two" }, side("raised", top), side("lowered", bottom)),
      site.bars({
        counts, edges: all, unit: "tokens", label: "Histogram of the logits over the vocabulary", height: 120,
        range: (from, to) => `${site.number(from)} to ${site.number(to)}`, ticks: site.ticks(low, high),
      }));
  };

  const NEAR = [
    ["similar", "Similar direction", "cosine of decoder directions"],
    ["correlated", "Correlated", "Pearson's correlation of activations", true],
    ["coactive", "Active together", "tokens with both, over tokens with either", true],
    ["neurons", "Neurons", "cosine with the output of the layer's neurons"],
  ];
  const sampled = () => ` (of ${site.number(site.value("about").about.n_rows_together)} random tokens)`;
  const neighbours = (record, link) =>
    card("Neighbours", NEAR.filter(([name]) => record.neighbours[name]?.length).map(([name, title, what, isSampled]) =>
      el("details", { open: name === "similar" || name === "correlated" }, el("summary", {}, el("span", {}, title), " ", el("span", { class: "note" }, what, isSampled ? sampled() : "")),
        table(title, name === "neurons" ? ["neuron", "value"] : ["latent", "top token", "value"],
          record.neighbours[name].map(([number, value, token]) =>
            name === "neurons" ? [String(number), site.number(value)]
              : [link(number), token === "" ? "" : site.chip(token), site.number(value)])))));

  const tokens = (record) => {
    const most = record.tokens[0]?.[1];
    return card("Tokens",
      el("p", { class: "note" }, "The tokens that have most of its activation, and their shares."),
      table("Top tokens", ["token", "share", unseen("bar")], record.tokens.map(([text, value]) => [site.chip(text), site.percent(value), share(value, most)])),
      record.bigram ? el("p", {}, "Top pair: ", site.chip(record.bigram[0]), " ", site.chip(record.bigram[1]), ` ${site.percent(record.bigram[2])}`) : null);
  };

  // options: link (number -> node), head (nodes beside the title), tab, onTab.
  site.latentPage = (record, { link = (number) => String(number), head = [], tab, onTab } = {}) => {
    const { about } = site.value("about");
    const isDead = !record.figures.count;
    const summary = isDead ? el("p", {}, el("b", {}, "Dead: "), `it fires on none of the ${site.number(about.n_counted)} tokens.`)
      : el("p", { class: "summary" }, record.tokens.slice(0, 6).map(([text]) => site.chip(text)));
    const examples = site.examples(record, tab, onTab);
    const page = el("article", { class: "latent" },
      el("div", { class: "title" }, el("h1", { tabindex: "-1" }, `Latent ${record.latent}`), head),
      summary,
      el("p", { class: "note" }, `${about.name} · ${about.hook_point} of ${about.model} · text: ${about.text}`),
      facts(record, FIRST),
      el("div", { class: "columns" }, examples,
        el("div", { class: "panels" },
          record.histogram ? histogram(record) : null,
          tokens(record),
          record.logits ? logits(record) : null,
          record.quantiles ? quantiles(record) : null,
          record.neighbours ? neighbours(record, link) : null,
          card("More figures", facts(record, REST)))));
    page.examples = examples;
    return page;
  };
})();
