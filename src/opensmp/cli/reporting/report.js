"use strict";
const SVG = "http://www.w3.org/2000/svg";
const NAMES = { F: "forward", B: "backward", W: "weight gradients", R: "recomputation" };

function made(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const key in attributes) element.setAttribute(key, attributes[key]);
  if (text !== undefined) element.textContent = text;
  return element;
}

function shown(seconds) {
  const [factor, unit] = seconds >= 1 ? [1, "s"] : seconds >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
  const value = seconds * factor;
  return value.toFixed(value >= 100 || value === 0 ? 0 : value >= 10 ? 1 : 2) + " " + unit;
}

// Ticks at 1, 2 or 5 times a power of ten.
function ticks(from, to, most) {
  const rough = (to - from) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(from / step); i * step <= to; i++) found.push(i * step);
  return found;
}

function timeline(box) {
  const data = JSON.parse(box.querySelector("script").textContent);
  const svg = box.querySelector("svg");
  const readout = box.querySelector(".readout");
  const height = data.rows.length > 40 ? 12 : 22;
  const long = Math.max(...data.rows.map((row) => row.length));
  const margin = Math.min(130, 14 + 7 * long);
  const several = data.several;
  let from = 0, to = data.seconds || 1e-9;
  const least = to / 5000;

  function set(newFrom, newTo) {
    let length = Math.min(data.seconds, Math.max(least, newTo - newFrom));
    from = Math.max(0, Math.min(newFrom, data.seconds - length));
    to = from + length;
    draw();
  }

  function draw() {
    const width = svg.clientWidth || 600;
    const inner = Math.max(50, width - margin - 8);
    const bottom = data.rows.length * height + 6;
    const scale = inner / (to - from);
    svg.setAttribute("height", bottom + 22);
    svg.setAttribute("viewBox", `0 0 ${width} ${bottom + 22}`);
    const all = document.createDocumentFragment();
    for (const tick of ticks(from, to, Math.max(2, inner / 90))) {
      const x = margin + (tick - from) * scale;
      all.append(made("line", { x1: x, x2: x, y1: 2, y2: bottom }));
      const anchor = x > width - 30 ? "end" : x < margin + 20 ? "start" : "middle";
      all.append(made("text", { x, y: bottom + 15, "text-anchor": anchor }, shown(tick)));
    }
    data.rows.forEach((row, index) => {
      if (height > 15 || index % 2 === 0)
        all.append(made("text", { x: margin - 6, y: 4 + (index + 0.7) * height, "text-anchor": "end", class: "row" }, row));
    });
    data.events.forEach(([row, start, end, kind, segment, microbatch], index) => {
      if (end < from || start > to) return;
      const left = margin + Math.max(0, (start - from) * scale);
      const right = margin + Math.min(inner, (end - from) * scale);
      const wide = Math.max(0.5, right - left - 0.6);
      const y = 4 + row * height;
      all.append(made("rect", { x: left, y, width: wide, height: height - 3, rx: 2, class: kind, "data-index": index }));
      const text = several ? `${segment}${kind}${microbatch}` : `${microbatch}`;
      if (height > 15 && wide > 7 * text.length + 2)
        all.append(made("text", { x: left + wide / 2, y: y + 14, "text-anchor": "middle", class: "on" + kind }, text));
    });
    svg.replaceChildren(all);
    box.dataset.from = from;
    box.dataset.to = to;
  }

  function zoom(factor, at) {
    const middle = at === undefined ? (from + to) / 2 : at;
    set(middle - (middle - from) * factor, middle + (to - middle) * factor);
  }

  function time(event) {
    const bounds = svg.getBoundingClientRect();
    const inner = Math.max(50, bounds.width - margin - 8);
    return from + ((event.clientX - bounds.left - margin) / inner) * (to - from);
  }

  const actions = {
    in: () => zoom(0.5), out: () => zoom(2), all: () => set(0, data.seconds),
    left: () => set(from - (to - from) / 4, to - (to - from) / 4),
    right: () => set(from + (to - from) / 4, to + (to - from) / 4),
  };
  for (const button of box.querySelectorAll("button"))
    button.addEventListener("click", actions[button.dataset.action]);
  const keys = { "+": "in", "=": "in", "-": "out", 0: "all", ArrowLeft: "left", ArrowRight: "right" };
  svg.addEventListener("keydown", (event) => {
    const action = actions[keys[event.key]];
    if (action && !event.ctrlKey && !event.metaKey) { event.preventDefault(); action(); }
  });
  // Without Ctrl the wheel scrolls the page; a pinch on a touch pad comes with Ctrl.
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(event.deltaY / 300), time(event));
  }, { passive: false });
  svg.addEventListener("dblclick", (event) => zoom(0.4, time(event)));
  let drag = null;
  svg.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, from, to };
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    if (drag) {
      const inner = Math.max(50, svg.clientWidth - margin - 8);
      const moved = ((event.clientX - drag.x) / inner) * (drag.to - drag.from);
      if (moved) set(drag.from - moved, drag.to - moved);
      return;
    }
    tell(event);
  });
  for (const name of ["pointerup", "pointercancel"])
    svg.addEventListener(name, (event) => { drag = null; tell(event); });

  function tell(event) {
    const hit = document.elementFromPoint(event.clientX, event.clientY);
    const found = hit && hit.dataset && data.events[hit.dataset.index];
    if (!found) { readout.textContent = ""; return; }
    const [row, start, end, kind, segment, microbatch] = found;
    const where = several ? `, segment ${segment}` : "";
    readout.textContent = `${data.rows[row]}: ${NAMES[kind]} of microbatch ${microbatch}${where}, ` +
      `${shown(end - start)}, from ${shown(start)} to ${shown(end)}`;
  }

  if (window.ResizeObserver) {
    let width = 0;
    new ResizeObserver(() => {
      if (svg.clientWidth !== width) { width = svg.clientWidth; draw(); }
    }).observe(svg);
  }
  draw();
}

for (const box of document.querySelectorAll(".timeline")) timeline(box);
for (const button of document.querySelectorAll("[data-full]"))
  button.addEventListener("click", () => {
    const picture = button.parentElement.nextElementSibling;
    const full = picture.classList.toggle("full");
    button.textContent = full ? "Fit the page" : "Full size";
  });
