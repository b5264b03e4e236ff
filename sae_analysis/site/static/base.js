// Elements, numbers and data. Everything else of the site hangs on `site`.
// Text of the corpus enters the page as text nodes only; nothing here makes elements of a string.
"use strict";

const site = {};

(() => {
  const SVG = "http://www.w3.org/2000/svg";

  const build = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return element;
  };
  // An element with attributes, listeners (on...) and children; strings among these become text.
  site.el = (tag, attributes, ...children) => build(document.createElement(tag), attributes, children);
  site.svg = (tag, attributes, ...children) => build(document.createElementNS(SVG, tag), attributes, children);

  // ---------------------------------------------------------------------------------------------------------- numbers

  site.number = (value, digits = 3) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e15) return value.toLocaleString("en-US");
    if (size >= 1e5 || size < 1e-3) return Number(value.toPrecision(digits)).toExponential().replace("e+", "e").replaceAll("-", "−");
    return Number(value.toPrecision(digits)).toLocaleString("en-US", { maximumFractionDigits: 8 }).replace("-", "−");
  };
  site.percent = (share, digits = 2) => {
    if (share === null || share === undefined || Number.isNaN(share)) return "–";
    return share === 0 ? "0 %" : `${Number((100 * share).toPrecision(digits)).toString()} %`;
  };

  // ------------------------------------------------------------------------------------------------------------- data

  const values = new Map();
  const waiting = new Map();

  // Called by the script files under data/.
  site.put = (name, value) => {
    values.set(name, value);
    waiting.get(name)?.(value);
    waiting.delete(name);
    if (name === "about") site.start?.();
  };
  site.value = (name) => values.get(name);

  const promises = new Map();
  // The value of data/<name>.js, which is loaded once, when it is first asked for.
  site.load = (name) => {
    if (values.has(name)) return Promise.resolve(values.get(name));
    if (!promises.has(name)) {
      const loading = new Promise((resolve, reject) => {
        waiting.set(name, resolve);
        const failed = () => {
          promises.delete(name);
          reject(new Error(`data/${name}.js: found no such file beside this page; copy the whole folder.`));
        };
        document.head.append(site.el("script", { src: `data/${name}.js`, charset: "utf-8", onerror: failed }));
      });
      promises.set(name, loading);
    }
    return promises.get(name);
  };

  const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0)).buffer;
  const columns = new Map();
  // One figure of all latents, as an array by place in the default order, the clearest first; NaN where there is none.
  // "order": the latent at each place.
  site.column = async (name) => {
    if (!columns.has(name)) {
      const buffer = bytes(await site.load(`columns/${name}`));
      const Kind = name !== "order" ? Float32Array : site.value("about").n_latents <= 1 << 16 ? Uint16Array : Uint32Array;
      columns.set(name, new Kind(buffer));
    }
    return columns.get(name);
  };

  // Which of the files that begin with `firsts`, numbers or words, holds `number`; -1 if it is before all.
  site.fileOf = (firsts, number) => {
    let low = 0;
    let high = firsts.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (firsts[middle] <= number) low = middle + 1;
      else high = middle;
    }
    return low - 1;
  };

  let firstLatents = null; // of each file of latents
  site.record = async (latent) => {
    if (!firstLatents) {
      let at = 0;
      firstLatents = site.value("about").latent_files.map((n) => (at += n) - n);
    }
    const records = await site.load(`latents/${site.fileOf(firstLatents, latent)}`);
    return records.find((record) => record.latent === latent);
  };

  // The row of the latent at a place.
  site.row = async (place) => {
    const per = site.value("about").rows_per_file;
    return (await site.load(`rows/${Math.floor(place / per)}`))[place % per];
  };

  // The texts of the tokens of a whole context.
  site.context = async (number) => {
    const file = site.fileOf(site.value("about").context_files, number);
    const found = (await site.load(`contexts/${file}`)).find((pair) => pair[0] === number);
    return site.split(found[1]);
  };
  site.split = (joined) => joined.split("\x7f");

  // ------------------------------------------------------------------------------------------------- what people read

  site.FIGURES = {
    density: ["density", "share of tokens on which it fires"],
    count: ["firings", "tokens on which it fires"],
    max: ["maximum", "largest activation"],
    mean: ["mean", "mean activation where it fires"],
    mean_all: ["mean over all", "mean activation over all tokens"],
    variance: ["variance", "variance of its activation where it fires"],
    skew: ["skew", "skew of its activation where it fires"],
    kurtosis: ["kurtosis", "kurtosis of its activation where it fires; 3 for a normal distribution"],
    first: ["first firing", "number of the token in the corpus"],
    last: ["last firing", "number of the token in the corpus"],
    mean_position: ["mean position", "in the context, where it fires"],
    decoder_norm: ["decoder norm", "length of its decoder direction"],
    encoder_norm: ["encoder norm", "length of its encoder direction"],
    encoder_bias: ["encoder bias", "bias of its encoder"],
    encoder_decoder_cosine: ["encoder–decoder cosine", "cosine between its encoder and decoder directions"],
    decoder_x: ["first principal direction", "place along the first principal direction of all decoder directions"],
    decoder_y: ["second principal direction", "place along the second principal direction of all decoder directions"],
    logit_skew: ["logit skew", "skew of the logits that its direction adds, over the vocabulary"],
    logit_kurtosis: ["logit kurtosis", "kurtosis of the logits that its direction adds; 3 for a normal distribution"],
    token_entropy: ["token entropy", "bits: how widely its activation is spread over the vocabulary"],
    top_token_share: ["top token's share", "share of its activation on the token that has most of it"],
    top_bigram_share: ["top pair's share", "share of its activation on the pair of tokens that has most of it"],
  };
  site.figureName = (name) => site.FIGURES[name]?.[0] ?? name.replaceAll("_", " ");
  site.figureText = (name, value) =>
    ["density", "top_token_share", "top_bigram_share"].includes(name) ? site.percent(value, 3) : site.number(value);

  site.say = (text) => {
    let region = document.getElementById("said");
    if (!region) {
      region = site.el("div", { id: "said", class: "unseen", role: "status", "aria-live": "polite" });
      document.body.append(region);
    }
    region.textContent = text;
  };

  // Shows what went wrong in place of what was asked for.
  site.failure = (error) => site.el("p", { class: "failure", role: "alert" }, String(error.message ?? error));
})();
