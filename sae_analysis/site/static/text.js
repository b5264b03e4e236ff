// Text of the corpus, so that a reader sees what is there: line ends, control characters and signs that turn the
// direction of the text are shown, not obeyed.
"use strict";

(() => {
  const { el } = site;
  const LONGEST_CHIP = 28; // letters of a token that stands alone
  // Controls, soft hyphen, signs of direction and of no width, byte order marks, and halves of characters.
  const ODD =
    /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udfff]/gu;
  const NAMES = { "\n": "↵", "\r": "␍", "\t": "⇥" };

  const nameOf = (sign) => {
    const code = sign.codePointAt(0);
    if (NAMES[sign]) return NAMES[sign];
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    if (code === 0x7f) return "␡";
    return `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
  };

  const cut = (text) => {
    const letters = Array.from(text);
    return letters.length <= LONGEST_CHIP ? text : `${letters.slice(0, LONGEST_CHIP).join("")}…`;
  };

  // Nodes that show a text; `spaces`: spaces at its ends as a sign too, where a token stands alone.
  site.visible = (text, spaces = false) => {
    const nodes = [];
    let at = 0;
    const sign = (name) => el("span", { class: "sign" }, name);
    let body = text;
    let tail = 0;
    if (spaces) {
      const lead = text.length - text.replace(/^ +/, "").length;
      body = text.slice(lead);
      tail = body.length - body.replace(/ +$/, "").length;
      body = body.slice(0, body.length - tail);
      if (lead) nodes.push(sign("·".repeat(Math.min(lead, 8))));
    }
    for (const found of body.matchAll(ODD)) {
      if (found.index > at) nodes.push(body.slice(at, found.index));
      nodes.push(sign(nameOf(found[0])));
      at = found.index + found[0].length;
    }
    if (at < body.length) nodes.push(body.slice(at));
    if (tail) nodes.push(sign("·".repeat(Math.min(tail, 8))));
    return nodes;
  };

  // The same as plain text, for labels and titles.
  site.plain = (text) => text.replace(ODD, nameOf);

  // A token that stands alone, as in a table.
  site.chip = (text) =>
    el("span", { class: "chip", dir: "auto" }, text === "" ? "∅" : site.visible(cut(text), true));
})();
