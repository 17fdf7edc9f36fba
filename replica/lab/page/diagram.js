// The space–time diagram as SVG. Every element knows the step at which it appears.

import { KINDS, boxWidth, boxes, inWords, layout, nameOf, rowOf } from "./trace.js";

const SVG = "http://www.w3.org/2000/svg";
const ROW = 48;
// Arrows that came so many lines before the present one are drawn pale.
const OLD_STEPS = 60;
export const STYLE = `
text{font:11px system-ui,"DejaVu Sans",sans-serif;fill:var(--ink)} .mono{font:10.5px ui-monospace,"DejaVu Sans Mono",monospace}
.tick,.small{fill:var(--dim);font-size:10px} .lane{stroke:var(--dim);stroke-width:1.5} .band{fill:var(--faulty)}
.message{stroke:var(--ink);stroke-width:1.4;fill:none} .message.dim{stroke:var(--dim);stroke-width:1}
.message.fetch{stroke-dasharray:2 4} .message.early,.message.waits{stroke:var(--warn);stroke-width:2}
.message.forked,.message.refused,.message.lost{stroke:var(--bad)} .message.lost,.message.ignored{stroke-dasharray:5 4}
.head{fill:var(--ink)} .head.dim{fill:var(--dim)} .head.early,.head.waits{fill:var(--page);stroke:var(--warn);stroke-width:2}
.head.forked,.head.refused,.head.lost{fill:var(--bad)} .hit{stroke:transparent;stroke-width:11;fill:none;cursor:pointer}
.box{stroke-width:1.5;cursor:pointer} .signed{stroke-dasharray:4 3} .copy{stroke-width:3} .diamond{fill:var(--ink)}
${Object.values(KINDS).map(([c]) => `.box.${c}{fill:var(--${c});stroke:var(--${c}-edge)}`).join(" ")}
.box.other{fill:var(--point);stroke:var(--point-edge)} .bad-line{stroke:var(--bad);stroke-width:2.5} .bad-text{fill:var(--bad);font-weight:700}
.warn-text{fill:var(--warn);font-weight:600} .script-line{stroke:var(--dim);stroke-dasharray:3 4} .good-text{fill:var(--good);font-weight:600}
.future{visibility:hidden} .arrow.old{opacity:.3} .arrow.old.chosen{opacity:1} .now{fill:var(--now);opacity:.38} .decisive{fill:none;stroke:var(--bad);stroke-width:2.5}
.chosen .box,.chosen .message{stroke-width:4} .mark{cursor:pointer}`;

function make(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

export class Diagram {
  // onChoose(line): what happens when somebody clicks on a message, an entry or a mark.
  constructor(trace, room, onChoose) {
    this.trace = trace;
    this.places = layout(trace, room);
    this.onChoose = onChoose;
    this.elements = []; // [{step, node, x}], in order
    const { width, height } = this.places;
    this.svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Space–time diagram: ${trace.header.title}` });
    this.svg.append(make("style", {}, STYLE));
    this._lanes();
    this.now = make("rect", { class: "now", y: 0, width: 14, height, x: -20 });
    this.svg.append(this.now);
    const messages = make("g", {}), rest = make("g", {});
    this.svg.append(messages, rest);
    const lines = make("g", {});
    messages.before(lines);
    for (const line of trace.drawn) this._draw(line, messages, rest, lines);
    this.elements.sort((a, b) => a.step - b.step);
  }

  _lanes() {
    const { lanes, width, xs } = this.places;
    for (const lane of lanes.values()) {
      if (lane.faulty) this.svg.append(make("rect", { class: "band", x: 0, y: lane.y, width, height: lane.height - 4 }));
      this.svg.append(make("line", { class: "lane", x1: 0, x2: width, y1: lane.line, y2: lane.line }));
      if (lane.before) {
        this.svg.append(make("text", { class: "small", x: 4, y: lane.line + 26 }, `1–${lane.before}`));
        this.svg.append(make("text", { class: "small", x: 4, y: lane.line + 38 }, "before"));
      }
    }
    let last = -100;
    for (const [time, x] of xs) {
      if (x - last < 52) continue;
      last = x;
      this.svg.append(make("text", { class: "tick", x, y: 10 }, `${time} ms`));
      this.svg.append(make("line", { class: "lane", x1: x, x2: x, y1: 13, y2: 17 }));
    }
  }

  _draw(line, messages, rest, lines) {
    if (line.type === "message") this._message(line, messages);
    else if (line.type === "append") this._append(line, rest);
    else if (line.type === "violation") this._violation(line, lines);
    else if (line.type === "note" && line.who === null) this._script(line, lines);
    else if (this.places.places.has(line.step)) this._mark(line, rest);
  }

  _add(line, node, parent, x) {
    node.append(make("title", {}, `${line.who ? nameOf(line.who) + " " : ""}${line.to ? nameOf(line.to) + " " : ""}${inWords(line)}`));
    node.addEventListener("click", () => this.onChoose(line));
    parent.append(node);
    this.elements.push({ step: line.step, node, x });
  }

  _message(line, parent) {
    const { lanes, xs } = this.places;
    const from = lanes.get(line.from), to = lanes.get(line.to);
    const x1 = xs.get(Math.max(line.sent, this.trace.header.begins)), x2 = xs.get(line.at), y1 = from.line, y2 = to.line;
    const slack = y2 > y1 ? -5 : 5;
    const isDim = ["request", "reply", "state", "fetch"].includes(line.kind);
    const names = `${isDim ? "dim" : ""} ${line.kind} ${line.became}`;
    const group = make("g", { class: "arrow" });
    const path = `M${x1} ${y1} L${x2} ${y2 + slack}`;
    group.append(make("path", { class: `message ${names}`, d: path }));
    if (line.became === "lost") {
      const [mx, my] = [(x1 + x2) / 2, (y1 + y2) / 2];
      group.append(make("path", { class: "message lost", d: `M${mx - 5} ${my - 5} l10 10 m-10 0 l10 -10` }));
    } else if (line.became === "early" || line.became === "waits") {
      group.append(make("circle", { class: `head ${names}`, cx: x2, cy: y2 + slack, r: 4.5 }));
    } else {
      const angle = (Math.atan2(y2 + slack - y1, x2 - x1) * 180) / Math.PI;
      group.append(make("path", { class: `head ${names}`, d: "M0 0 L-9 -3.6 L-9 3.6 Z", transform: `translate(${x2} ${y2 + slack}) rotate(${angle})` }));
    }
    group.append(make("path", { class: "hit", d: path }));
    this._add(line, group, parent, x2);
  }

  _append(line, parent) {
    const lane = this.places.lanes.get(line.who), { x } = this.places.places.get(line.step);
    const y = lane.line + 9 + lane.rows.indexOf(rowOf(line)) * ROW;
    const group = make("g", {});
    let left = x;
    const head = line.head ? `#${line.head.slice(0, 6)}` : line.attested ? "" : "signed";
    const found = boxes(line);
    found.forEach((box, place) => {
      const kind = (KINDS[box.entries[0].kind] || ["other"])[0], width = boxWidth(box);
      group.append(make("rect", { class: `box ${kind} ${line.attested ? "" : "signed"} ${line.copy ? "copy" : ""}`, x: left, y, width, height: ROW - 8, rx: 3 }));
      group.append(make("text", { class: "mono", x: left + 5, y: y + 12 }, box.top));
      group.append(make("text", { class: "mono", x: left + 5, y: y + 24 }, box.low));
      if (place === found.length - 1) group.append(make("text", { class: "small mono", x: left + 5, y: y + 36 }, head));
      left += width;
    });
    group.append(make("line", { class: "lane", x1: x, x2: x, y1: lane.line, y2: y }));
    this._add(line, group, parent, x);
  }

  _mark(line, parent) {
    const lane = this.places.lanes.get(line.who), { x } = this.places.places.get(line.step);
    const group = make("g", { class: "mark" });
    const tone = ["exposed", "forked", "halt"].includes(line.about) ? "bad-text" : line.about === "early" ? "warn-text" : line.type === "answer" ? "good-text" : "";
    if (line.type === "execute") {
      group.append(make("path", { class: "diamond", d: `M${x} ${lane.line} l6 -6 l6 6 l-6 6 Z` }));
    } else {
      group.append(make("circle", { class: "diamond", cx: x + 5, cy: lane.line, r: 3.2 }));
    }
    group.append(make("text", { class: tone, x: x + 2, y: lane.line - 9 }, this.places.mark(line)));
    this._add(line, group, parent, x);
  }

  _script(line, parent) {
    const x = this.places.xs.get(line.at), group = make("g", { class: "mark" });
    group.append(make("line", { class: "script-line", x1: x, x2: x, y1: 18, y2: this.places.height }));
    group.append(make("text", { class: "small", x: x + 3, y: 30 }, "▾ script"));
    this._add(line, group, parent, x);
  }

  _violation(line, parent) {
    if (line.isRepeated) return;
    const x = this.places.places.get(line.step).x + 4, group = make("g", { class: "mark" });
    group.append(make("line", { class: "bad-line", x1: x, x2: x, y1: 18, y2: this.places.height }));
    group.append(make("text", { class: "bad-text", x: x + 4, y: 30 }, `✖ ${line.kind}`));
    this._add(line, group, parent, x);
  }

  // Show what happened up to a step, and where that is.
  show(step) {
    let at = 0;
    for (const element of this.elements) {
      const isFuture = element.step > step;
      element.node.classList.toggle("future", isFuture);
      element.node.classList.toggle("old", element.step < step - OLD_STEPS);
      if (!isFuture && (element.step === step || element.x > at)) at = element.x;
    }
    const exact = this.elements.find((element) => element.step === step);
    this.now.setAttribute("x", (exact ? exact.x : at) - 7);
    return exact ? exact.x : at;
  }

  choose(step) {
    for (const element of this.elements) element.node.classList.toggle("chosen", element.step === step);
  }

  // The diagram as a file of its own: colours resolved, lanes named.
  file() {
    const copy = this.svg.cloneNode(true), { width, height, lanes } = this.places, names = 100;
    const computed = getComputedStyle(document.documentElement);
    const resolve = (text) => text.replace(/var\((--[\w-]+)\)/g, (_, name) => computed.getPropertyValue(name).trim());
    copy.querySelector("style").textContent = resolve(STYLE);
    copy.setAttribute("xmlns", SVG);
    copy.setAttribute("width", width + names);
    copy.setAttribute("viewBox", `${-names} -24 ${width + names} ${height + 24}`);
    copy.setAttribute("height", height + 24);
    copy.prepend(make("rect", { x: -names, y: -24, width: width + names, height: height + 24, fill: resolve("var(--page)") }));
    copy.append(make("text", { x: -names + 6, y: -8, "font-weight": 700 }, `${this.trace.header.system}: ${this.trace.header.title} (seed ${this.trace.header.seed})`));
    for (const lane of lanes.values()) {
      copy.append(make("text", { x: -names + 6, y: lane.line + 4 }, lane.name));
      if (lane.faulty) copy.append(make("text", { class: "bad-text", x: -names + 6, y: lane.line + 17 }, "faulty"));
    }
    return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(copy)}\n`;
  }
}
