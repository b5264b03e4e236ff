// The first page: what was analysed, the clearest latents, and all latents in four plots.
"use strict";

(() => {
  const { el } = site;
  const N_CLEAREST = 10;
  const N_SELECTED = 25;
  const LOG = new Set(["density", "max", "mean", "variance", "logit_kurtosis", "kurtosis"]);

  const facts = () => {
    const { about, n_latents: n, n_dead: dead } = site.value("about");
    const found = [
      ["Model", about.model], ["Hook point", about.hook_point],
      about.target_hook_point !== about.hook_point ? ["Writes to", about.target_hook_point] : null,
      ["Architecture", about.architecture], ["Latents", `${site.number(n)} in ${site.number(about.d_in)} dimensions`],
      ["Dead", `${site.number(dead)} (${site.percent(dead / n)})`], ["Text", about.text],
      ["Tokens", `${site.number(about.n_counted)} in ${site.number(about.n_contexts)} contexts of ${site.number(about.context_size)}`],
    ];
    return el("dl", {}, found.filter(Boolean).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", { dir: "auto" }, site.visible(String(value))))));
  };

  const card = (id, title, ...content) => el("section", { class: "card", "aria-labelledby": id }, el("h2", { id }, title), ...content);

  // Of a chart in units of its letters, so that these are as large on a phone.
  const size = () => (innerWidth < 700 ? { width: 360, height: 170 } : { width: 560, height: 190 });

  const density = () => {
    const { counts, edges } = site.value("about").histograms.density;
    const address = (low, high) => site.address({ density: `${(10 ** low).toPrecision(6)}..${(10 ** high).toPrecision(6)}` });
    return card("density-title", "How often latents fire",
      site.bars({
        counts, edges, unit: "latents", label: "Histogram of the densities of latents; each bar leads to its latents", pick: address, ...size(),
        range: (low, high) => `density ${site.percent(10 ** low)} to ${site.percent(10 ** high)}`,
        ticks: counts.length ? site.logTicks(edges[0], edges[edges.length - 1], (value) => site.percent(value)) : [],
      }),
      el("p", { class: "note" }, "Share of tokens on which a latent fires. A bar leads to its latents."));
  };

  const cosine = () => {
    const { counts, edges } = site.value("about").histograms.cosine;
    const address = (low, high) => site.address({ encoder_decoder_cosine: `${low}..${high}` });
    return card("cosine-title", "Encoder against decoder",
      site.bars({
        counts, edges, unit: "latents", label: "Histogram of the cosines of encoder and decoder; each bar leads to its latents", pick: address, ...size(),
        range: (low, high) => `cosine ${site.number(low)} to ${site.number(high)}`, ticks: counts.length ? site.ticks(edges[0], edges[edges.length - 1]) : [],
      }),
      el("p", { class: "note" }, "Cosine between a latent's encoder and decoder directions."));
  };

  // What the rectangle of a plot selects, below it.
  const selection = () => {
    const place = el("div", { class: "selection" });
    let turn = 0;
    place.show = async (places) => {
      const mine = ++turn;
      if (!places) return place.replaceChildren();
      site.selection = new Set(places);
      const title = `${site.number(places.length)} latents selected`;
      site.say(title);
      const rows = await Promise.all(places.slice(0, N_SELECTED).map(site.row));
      if (mine !== turn) return undefined;
      return place.replaceChildren(el("h3", {}, title, " "), el("p", {}, places.length ? el("a", { href: site.address({ selection: "1" }) }, "Show them in the list") : ""),
        rows.length ? site.rowTable(rows, title) : "");
    };
    return place;
  };

  const axis = async (name) => ({ values: await site.column(name), title: site.figureName(name), isLog: LOG.has(name) });

  // Puts what `make` returns into a card once it is scrolled to.
  const later = (id, title, make) => {
    const waiting = el("p", { class: "note waiting" }, "Drawn when scrolled to.");
    const part = card(id, title, waiting);
    const seen = new IntersectionObserver(async (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      seen.disconnect();
      waiting.textContent = "Loading …";
      try {
        waiting.replaceWith(...(await make()));
      } catch (error) {
        waiting.replaceWith(site.failure(error));
      }
    });
    seen.observe(part);
    return part;
  };

  const chooser = (label, id, chosen, change) => {
    const names = site.value("about").columns.filter((name) => !name.startsWith("decoder_") || name === "decoder_norm");
    const select = el("select", { id, onchange: () => change(select.value) }, names.map((name) => el("option", { value: name, selected: name === chosen }, site.figureName(name))));
    return el("div", { class: "field" }, el("label", { for: id }, label), select);
  };

  const figures = () => later("figures-title", "Figures of all latents", async () => {
    const found = selection();
    const plot = site.scatter({ x: await axis("density"), y: await axis("max"), order: await site.column("order") }, "Scatter plot of two figures of all latents", found.show);
    const set = (side) => async (name) => plot.show({ [side]: await axis(name) });
    return [
      el("div", { class: "controls" }, chooser("Across", "across", "density", set("x")), chooser("Up", "up", "max", set("y"))),
      plot, el("p", { class: "note" }, "Drag over latents to list them; a click opens one."), found,
    ];
  });

  const directions = () => later("directions-title", "Decoder directions", async () => {
    const found = selection();
    const axes = { x: await axis("decoder_x"), y: await axis("decoder_y"), order: await site.column("order") };
    return [
      site.scatter(axes, "Scatter plot of decoder directions", found.show),
      el("p", { class: "note" }, "Along the first two principal directions of all decoder directions: close together here may be far apart in the others."), found,
    ];
  });

  site.overviewPage = async () => {
    const { about, first } = site.value("about");
    return el("div", {}, el("h1", { tabindex: "-1", dir: "auto" }, site.visible(about.name)), facts(),
      card("first-title", "Latents worth a first look", site.rowTable(first.slice(0, N_CLEAREST), "Latents worth a first look"),
        el("p", {}, el("a", { href: "#/latents" }, "All latents: sort, filter, search"))),
      el("div", { class: "plots" }, density(), cosine(), figures(), directions()));
  };
})();
