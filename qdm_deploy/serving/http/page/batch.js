// The running batch: one cell a row, coloured by request; below it, the rows of the last steps.
"use strict";

const Batch = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  // Told apart by position and text as well; these differ in lightness for who sees few colours.
  const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6bb1", "#b8a800"];
  const SHOWN = 60;
  const colours = new Map();
  let next = 0;

  function colourOf(id) {
    if (!colours.has(id)) {
      if (colours.size > 500) colours.clear();
      colours.set(id, COLOURS[next++ % COLOURS.length]);
    }
    return colours.get(id);
  }

  function shape(parent, name, attributes, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  // Drawn in the pixels that it has, so that its text is as large as the page's.
  function widthOf(svg) { return Math.max(svg.clientWidth, 100); }

  function drawRows(state) {
    const svg = document.getElementById("rows");
    svg.replaceChildren();
    const total = widthOf(svg), perLine = Math.min(state.max_rows, 16);
    const lines = Math.ceil(state.max_rows / perLine);
    svg.setAttribute("viewBox", `0 0 ${total} ${lines * 32}`);
    const owners = state.running.flatMap((run) => Array(run.rows).fill(run));
    const width = total / perLine;
    for (let i = 0; i < state.max_rows; i++) {
      const x = (i % perLine) * width + 1, y = Math.floor(i / perLine) * 32 + 1, run = owners[i];
      const cell = { x, y, width: width - 2, height: 30, rx: 4 };
      if (!run) { shape(svg, "rect", { ...cell, class: "empty" }); continue; }
      shape(svg, "rect", { ...cell, fill: colourOf(run.id) });
      shape(svg, "rect", { x, y: y + 24, width: (width - 2) * run.step / run.steps, height: 6, class: "done" });
    }
    const parts = state.running.map((run) => `step ${run.step} of ${run.steps} in ${run.rows} row${run.rows === 1 ? "" : "s"}`);
    const text = state.running.length
      ? `${state.running_rows} of ${state.max_rows} rows: ${parts.slice(0, 6).join("; ")}${parts.length > 6 ? "; ..." : ""}.`
      : `Idle: 0 of ${state.max_rows} rows.`;
    document.getElementById("rows-text").textContent = text;
  }

  function drawHistory(state) {
    const svg = document.getElementById("history");
    svg.replaceChildren();
    const steps = state.recent_steps.slice(-SHOWN);
    const total = widthOf(svg), left = 24, height = 64;
    const most = Math.max(state.max_rows, 1), width = (total - left) / SHOWN;
    svg.setAttribute("viewBox", `0 0 ${total} 76`);
    for (const rows of [0, most]) {
      const y = 6 + height * (1 - rows / most);
      shape(svg, "line", { x1: left, x2: total, y1: y, y2: y, class: "grid" });
      shape(svg, "text", { x: left - 5, y: y + 3, "text-anchor": "end" }, rows);
    }
    steps.forEach((step, i) => {
      const x = left + (SHOWN - steps.length + i) * width;
      const filled = height * step.rows / most, padded = height * (step.rows + step.padding_rows) / most;
      if (step.padding_rows) shape(svg, "rect", { x, y: 6 + height - padded, width: width * 0.85, height: padded - filled, class: "pad" });
      shape(svg, "rect", { x, y: 6 + height - filled, width: width * 0.85, height: filled, class: "bar" });
    });
    const last = steps.at(-1);
    document.getElementById("n-rows").textContent = last ? String(last.rows) : "\u2013";
    document.getElementById("n-waiting").textContent = String(state.waiting);
    const times = steps.slice(-20).map((step) => step.seconds).sort((a, b) => a - b);
    const median = times[Math.floor(times.length / 2)];
    document.getElementById("n-step").textContent = times.length ? `${(median * 1000).toPrecision(3)} ms` : "\u2013";
  }

  return { colourOf, draw(state) { drawRows(state); drawHistory(state); } };
})();
