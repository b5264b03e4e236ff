// Search in the index that search_index.py wrote: a word's file is found by the words that files begin with.
"use strict";

(() => {
  const LONGEST = 40;
  const letters = (text, n) => Array.from(text).slice(0, n).join("");

  // The words and other signs of a text, as search_index.py cuts them.
  site.wordsOf = (text) =>
    (text.toLowerCase().match(/[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? []).map((word) => letters(word, LONGEST));

  const parsed = (postings) => {
    const found = new Map();
    let latent = 0;
    for (const posting of postings.split(",")) {
      const [step, number] = posting.split(".");
      latent += parseInt(step, 36);
      found.set(latent, parseInt(number, 36));
    }
    return found;
  };

  // latent -> number for a word; if there is none, for all words that begin with it.
  const lookUp = async (name, word, join) => {
    const firsts = await site.load(`search/${name}`);
    const merged = new Map();
    const add = (postings) => {
      for (const [latent, number] of parsed(postings)) merged.set(latent, join(merged.get(latent) ?? 0, number));
    };
    const start = Math.max(0, site.fileOf(firsts, word));
    for (let file = start; file < firsts.length && (file === start || firsts[file].startsWith(word)); file++) {
      const content = await site.load(`search/${name}-${file}`);
      const exact = content.find(([other]) => other === word);
      if (exact) return parsed(exact[1]);
      for (const [other, postings] of content) if (other.startsWith(word)) add(postings);
    }
    return merged;
  };

  // latent -> share of its activation on a token. Spaces around it and its case do not count.
  site.findToken = async (query) => {
    const key = letters(query.trim().toLowerCase(), LONGEST);
    if (key === "") return new Map();
    const found = await lookUp("tokens", key, (a, b) => a + b);
    return new Map([...found].map(([latent, thousandths]) => [latent, thousandths / 1000]));
  };

  const bits = (mask) => {
    let n = 0;
    for (let rest = mask >>> 0; rest; rest &= rest - 1) n++;
    return n;
  };

  // latent -> number of its top examples whose windows hold all words of the query.
  site.findText = async (query) => {
    let all = null;
    for (const word of new Set(site.wordsOf(query))) {
      const found = await lookUp("text", word, (a, b) => (a | b) >>> 0);
      if (all === null) all = found;
      else all = new Map([...all].map(([latent, mask]) => [latent, mask & (found.get(latent) ?? 0)]).filter(([, mask]) => mask));
    }
    return new Map([...(all ?? [])].map(([latent, mask]) => [latent, bits(mask)]));
  };
})();
