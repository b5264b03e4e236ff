// Scatter plots of all latents on a canvas, with a rectangle that selects some, by pointer or keys.
"use strict";

(() => {
  const { el, svg } = site;
  const LEFT = 46;
  const RIGHT = 12;
  const TOP = 10;
  const BOTTOM = 38;
  const HEIGHT = 360;

  const extent = (values) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      if (Number.isFinite(value)) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
    if (low > high) return [0, 1];
    const pad = (high - low) * 0.03 || 0.5;
    return [low - pad, high + pad];
  };

  // axes: {x, y}, each {values (of latents, by place in the default order), title, isLog}, and order (latent by place).
  // onSelect: told the places in that order of the latents in the rectangle, or null.
  site.scatter = (axes, label, onSelect) => {
    const canvas = el("canvas", { "aria-hidden": "true" });
    const frame = svg("svg", { class: "frame", "aria-hidden": "true" });
    const brush = el("div", { class: "brush", hidden: true });
    const hover = el("div", { class: "hover", hidden: true });
    const plot = el("div", {
      class: "scatter", tabindex: "0", role: "group",
      "aria-label": `${label}. Drag to select latents, or use the arrow keys to move a rectangle, with Shift to size it, Escape to clear it.`,
    }, canvas, frame, brush, hover);
    let points = []; // [x, y] in pixels of each latent, or null
    let width = 0;
    let rectangle = null; // [x0, y0, x1, y1]

    const scaled = ({ values, isLog }) => Float64Array.from(values, (value) => (isLog ? (value > 0 ? Math.log10(value) : NaN) : value));

    const draw = () => {
      width = plot.clientWidth;
      if (!width) return;
      const ratio = devicePixelRatio || 1;
      canvas.width = width * ratio;
      canvas.height = HEIGHT * ratio;
      const [xs, ys] = [scaled(axes.x), scaled(axes.y)];
      const [[x0, x1], [y0, y1]] = [extent(xs), extent(ys)];
      const toX = (value) => LEFT + ((value - x0) / (x1 - x0)) * (width - LEFT - RIGHT);
      const toY = (value) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
      points = Array.from(xs, (x, i) => (Number.isFinite(x) && Number.isFinite(ys[i]) ? [toX(x), toY(ys[i])] : null));
      const pen = canvas.getContext("2d");
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, width, HEIGHT);
      const size = xs.length > 8000 ? 1.6 : xs.length > 2000 ? 2.2 : 3;
      pen.globalAlpha = xs.length > 8000 ? 0.45 : 0.6;
      pen.fillStyle = getComputedStyle(plot).getPropertyValue("color");
      for (const point of points) if (point) pen.fillRect(point[0] - size / 2, point[1] - size / 2, size, size);
      drawFrame([x0, x1], [y0, y1], toX, toY);
    };

    const drawFrame = ([x0, x1], [y0, y1], toX, toY) => {
      const ticks = ({ isLog }, low, high) => (isLog ? site.logTicks(low, high) : site.ticks(low, high));
      const floor = HEIGHT - BOTTOM;
      frame.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      frame.replaceChildren(
        svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: floor, y2: floor }),
        svg("line", { class: "axis", x1: LEFT, x2: LEFT, y1: TOP, y2: floor }),
        ...ticks(axes.x, x0, x1).map(([value, text]) => svg("text", { class: "tick", x: toX(value), y: floor + 14, "text-anchor": "middle" }, text)),
        ...ticks(axes.y, y0, y1).map(([value, text]) => svg("text", { class: "tick", x: LEFT - 5, y: toY(value) + 4, "text-anchor": "end" }, text)),
        svg("text", { class: "axis-title", x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, axes.x.title),
        svg("text", { class: "axis-title", x: -(TOP + floor) / 2, y: 11, transform: "rotate(-90)", "text-anchor": "middle" }, axes.y.title));
    };

    const nearest = (x, y) => {
      let [best, distance] = [-1, 144];
      points.forEach((point, place) => {
        if (!point) return;
        const found = (point[0] - x) ** 2 + (point[1] - y) ** 2;
        if (found < distance) [best, distance] = [place, found];
      });
      return best;
    };

    const select = (next, isDone) => {
      rectangle = next;
      brush.hidden = !next;
      if (!next) return isDone && onSelect(null);
      const [x0, x1] = [Math.min(next[0], next[2]), Math.max(next[0], next[2])];
      const [y0, y1] = [Math.min(next[1], next[3]), Math.max(next[1], next[3])];
      Object.assign(brush.style, { left: `${x0}px`, top: `${y0}px`, width: `${x1 - x0}px`, height: `${y1 - y0}px` });
      if (!isDone) return undefined;
      const inside = [];
      points.forEach((point, place) => {
        if (point && point[0] >= x0 && point[0] <= x1 && point[1] >= y0 && point[1] <= y1) inside.push(place);
      });
      return onSelect(inside);
    };

    let start = null;
    const at = (event) => {
      const box = plot.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    plot.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      start = at(event);
      plot.setPointerCapture(event.pointerId);
    });
    plot.addEventListener("pointermove", (event) => {
      const [x, y] = at(event);
      if (start) {
        hover.hidden = true;
        select([...start, x, y], false);
        return;
      }
      const place = nearest(x, y);
      hover.hidden = place < 0;
      plot.classList.toggle("on-point", place >= 0);
      if (place < 0) return;
      const value = ({ values }) => site.number(values[place]);
      hover.textContent = `latent ${axes.order[place]} · ${axes.x.title} ${value(axes.x)} · ${axes.y.title} ${value(axes.y)}`;
      hover.style.top = `${points[place][1] + 8}px`;
      hover.style.left = `${Math.max(0, Math.min(points[place][0] + 8, width - hover.offsetWidth))}px`;
    });
    plot.addEventListener("pointerup", (event) => {
      if (!start) return;
      const [x, y] = at(event);
      const [x0, y0] = start;
      start = null;
      if (Math.hypot(x - x0, y - y0) > 4) {
        select([x0, y0, x, y], true);
        return;
      }
      const place = nearest(x, y);
      select(null, true);
      if (place >= 0) site.go(`#/latent/${axes.order[place]}`);
    });
    plot.addEventListener("pointercancel", () => {
      start = null;
      select(null, true);
    });
    plot.addEventListener("pointerleave", () => (hover.hidden = true));
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return select(null, true);
      const step = { ArrowLeft: [-12, 0], ArrowRight: [12, 0], ArrowUp: [0, -12], ArrowDown: [0, 12] }[event.key];
      if (!step || event.altKey || event.ctrlKey || event.metaKey) return undefined;
      event.preventDefault();
      event.stopPropagation();
      const [x0, y0, x1, y1] = rectangle ?? [width / 2 - 40, HEIGHT / 2 - 40, width / 2 + 40, HEIGHT / 2 + 40];
      const [dx, dy] = step;
      return select(event.shiftKey ? [x0, y0, x1 + dx, y1 + dy] : [x0 + dx, y0 + dy, x1 + dx, y1 + dy], true);
    });

    new ResizeObserver(draw).observe(plot);
    site.onTheme(draw);
    plot.show = (next) => {
      Object.assign(axes, next);
      select(null, true);
      draw();
    };
    return plot;
  };
})();
