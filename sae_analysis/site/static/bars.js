// Bar charts: plain SVG.
"use strict";

(() => {
  const { el, svg } = site;
  const LEFT = 6;
  const TOP = 14;
  const BOTTOM = 20;

  // counts (n) and edges (n + 1) as bars.
  //   label: what it shows, for those who do not see it.  ticks: [[place, text], ...] in units of the edges.
  //   unit: of what the counts are.  range: (low, high) -> text.  pick: (low, high) -> address that a bar leads to.
  //   marks: [[place, text], ...] vertical lines.
  site.bars = ({ counts, edges, label, ticks, unit, range, pick, marks = [], width = 380, height = 150 }) => {
    if (!counts.length) return el("p", { class: "note" }, "No values.");
    const most = Math.max(...counts, 1);
    const low = edges[0];
    const high = edges[edges.length - 1];
    const x = (value) => LEFT + ((value - low) / (high - low || 1)) * (width - 2 * LEFT);
    const y = (count) => TOP + (1 - count / most) * (height - TOP - BOTTOM);
    const floor = height - BOTTOM;
    const parts = [
      svg("line", { class: "axis", x1: LEFT, x2: width - LEFT, y1: floor, y2: floor }),
      svg("text", { class: "most", x: LEFT, y: TOP - 4 }, `${site.number(most)} ${unit}`),
    ];
    counts.forEach((count, i) => {
      const [from, to] = [x(edges[i]), x(edges[i + 1])];
      const text = `${range(edges[i], edges[i + 1])}: ${site.number(count)} ${unit}`;
      const bar = svg("rect", {
        class: "bar", x: from + 0.4, width: Math.max(to - from - 0.8, 0.6),
        y: count ? Math.min(y(count), floor - 1) : floor, height: count ? Math.max(floor - y(count), 1) : 0,
      });
      const reach = svg("rect", { class: "reach", x: from, width: Math.max(to - from, 0.6), y: TOP, height: floor - TOP });
      const group = [bar, reach, svg("title", {}, text)];
      if (pick && count) parts.push(svg("a", { href: pick(edges[i], edges[i + 1]), "aria-label": text }, ...group));
      else parts.push(svg("g", {}, ...group));
    });
    for (const [value, text] of marks) {
      if (value < low || value > high) continue;
      parts.push(svg("line", { class: "mark", x1: x(value), x2: x(value), y1: TOP, y2: floor }, svg("title", {}, text)));
    }
    for (const [value, text] of ticks) {
      if (value < low || value > high) continue;
      const place = x(value);
      const anchor = place < 24 ? "start" : place > width - 24 ? "end" : "middle";
      parts.push(svg("line", { class: "axis", x1: place, x2: place, y1: floor, y2: floor + 3 }));
      parts.push(svg("text", { class: "tick", x: place, y: floor + 15, "text-anchor": anchor }, text));
    }
    const role = pick ? "group" : "img";
    return svg("svg", { class: "bars", viewBox: `0 0 ${width} ${height}`, role, "aria-label": label }, ...parts);
  };

  // A few round numbers between two: [[number, text], ...].
  site.ticks = (low, high, n = 5, text = site.number) => {
    const rough = (high - low) / n || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) {
      const value = Number((i * step).toPrecision(12));
      found.push([value, text(value)]);
    }
    return found;
  };

  // The same for logarithms to the base 10: whole powers, and numbers between them where there are few of these.
  site.logTicks = (low, high, text = site.number) => {
    const found = [];
    const factors = high - low < 0.8 ? [1, 1.5, 2, 3, 4, 5, 7] : high - low < 2.2 ? [1, 2, 5] : [1];
    for (let power = Math.floor(low); power <= high; power++) {
      for (const factor of factors) {
        const place = power + Math.log10(factor);
        if (place >= low && place <= high) found.push([place, text(Number((factor * 10 ** power).toPrecision(6)))]);
      }
    }
    return found;
  };
})();
