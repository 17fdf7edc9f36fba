// One system's panel: what it is about, the diagram, what happens now, quorum meters, details, exports.

import { Diagram } from "./diagram.js";
import { inWords, metersAt, nameOf, shortName } from "./trace.js";

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function download(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export class Panel {
  // The parsed trace, its text, the address of its ShiViz log, and how wide a diagram may be at least.
  constructor({ trace, text, shiviz, room }) {
    this.trace = trace;
    const { header, verdict } = trace;
    this.diagram = new Diagram(trace, room, (line) => this.choose(line));
    this.said = element("div", { class: "said", "aria-live": "polite" });
    this.meters = element("div", { class: "meters" });
    this.details = element("div", { class: "details" });
    this.scroll = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Diagram, scrolls sideways" }, this.diagram.svg);
    const name = header.scenario;
    this.verdict = element("span", { class: "chip", hidden: true });
    this.node = element("article", { class: "panel" },
      element("div", { class: "about" },
        element("h2", {}, header.title, this.verdict),
        element("p", { class: "system" }, `${header.system} · n = ${header.n}, f = ${header.f}, quorum ${header.quorum} · seed ${header.seed}`),
        element("details", {}, element("summary", {}, "What is shown, and what is expected"),
          element("p", {}, header.tells), element("p", {}, `Expected: ${verdict.expected}.`))),
      element("div", { class: "drawing" }, this._names(), this.scroll),
      this.said,
      element("div", { class: "below" }, this.meters, this.details),
      element("div", { class: "about exports" }, "Export: ",
        element("button", { type: "button", "data-export": "svg", onclick: () => download(`${name}.svg`, "image/svg+xml", this.diagram.file()) }, "SVG"),
        element("button", { type: "button", "data-export": "jsonl", onclick: () => download(`${name}.jsonl`, "application/x-ndjson", text) }, "JSON lines"),
        element("a", { href: shiviz, download: `${name}.shiviz.log`, "data-export": "shiviz" }, "ShiViz log")));
  }

  // Draw again for another width.
  redraw(room) {
    this.diagram = new Diagram(this.trace, room, (line) => this.choose(line));
    this.scroll.replaceChildren(this.diagram.svg);
    this.scroll.previousElementSibling.replaceWith(this._names());
  }

  _names() {
    const { lanes, height } = this.diagram.places;
    const names = element("div", { class: "names" });
    names.style.height = `${height}px`;
    for (const lane of lanes.values()) {
      const row = element("div", { class: lane.faulty ? "faulty" : "" }, lane.name, element("small", {}, lane.faulty ? "faulty" : lane.rows.includes("outcome0") ? "messages, outcomes" : ""));
      row.style.top = `${lane.y}px`;
      row.style.height = `${lane.height - 4}px`;
      row.style.paddingTop = `${lane.line - lane.y - 8}px`;
      names.append(row);
    }
    return names;
  }

  // Show the trace up to a step.
  show(step) {
    const line = this.trace.lines[step] || this.trace.header, { verdict } = this.trace;
    const x = this.diagram.show(step);
    const view = this.scroll;
    if (x < view.scrollLeft + 60 || x > view.scrollLeft + view.clientWidth - 160) view.scrollLeft = Math.max(0, x - view.clientWidth * 0.55);
    const who = line.who ? nameOf(line.who) : line.to ? nameOf(line.to) : "";
    const isVerdict = line.type === "verdict";
    this.said.className = `said ${line.type === "violation" || (isVerdict && !verdict.safe) ? "bad" : ""} ${line.step === verdict.decided_by ? "decisive" : ""}`;
    const strong = element("strong", {}, who ? `${who} ` : "");
    this.said.replaceChildren(element("span", { class: "when" }, `${line.at} ms`), strong, this._words(line));
    this.verdict.hidden = step < verdict.step;
    this.verdict.className = `chip ${verdict.safe ? "good" : "bad"}`;
    this.verdict.textContent = `${verdict.safe ? "✓ safe" : "✖ safety broken"}${verdict.safe ? (verdict.live ? ", ✓ live" : ", ✖ not live") : ""}`;
    this._meters(step);
    this.choose(line, false);
  }

  _words(line) {
    const { verdict } = this.trace;
    if (line.type === "verdict") return `Verdict: ${this.trace.header.scenario === "break-it" ? line.happened : line.text}.`;
    if (line.type === "header") return line.tells;
    return (line.step === verdict.decided_by ? "★ this step decides it. " : "") + inWords(line);
  }

  _meters(step) {
    const { slot, meters } = metersAt(this.trace, step);
    const all = this.trace.header.lanes.filter((lane) => lane.id.startsWith("r")).map((lane) => lane.id);
    const title = element("h3", {}, slot === undefined ? "Quorums: nothing is counted yet" : `Quorums for slot ${slot}`);
    const rows = meters.sort((a, b) => (a.who + a.view + a.phase > b.who + b.view + b.phase ? 1 : -1)).map((meter) => {
      const pips = element("span", { class: "pips" }, ...all.map((id) => element("span", { class: `pip ${meter.voters.includes(id) ? "full" : ""}` }, meter.voters.includes(id) ? shortName(id) : "·")));
      const isMet = meter.voters.length >= meter.need;
      const what = `${meter.ops.join(" ").replaceAll("'s session", "…") || "null"} v${meter.view} ${meter.phase}s`;
      return element("tr", {}, element("td", {}, `${nameOf(meter.who)}`), element("td", {}, what), element("td", {}, pips),
        element("td", { class: isMet ? "met" : "short" }, `${meter.voters.length} of ${meter.need}${isMet ? " ✓" : ""}`));
    });
    const drawn = this.trace.lines.filter((line) => line.type === "quorums" && line.step <= step).map((line) => quorums(line, all));
    this.meters.replaceChildren(title, element("table", {}, element("tbody", {}, ...rows)), ...drawn);
  }

  choose(line, isClick = true) {
    this.diagram.choose(line.step);
    this.details.replaceChildren(...describe(line, this.trace));
    if (isClick) this.details.scrollIntoView({ block: "nearest" });
  }
}

function quorums(line, all) {
  const table = element("table", {}, element("tbody", {}, ...line.sets.map((set) => element("tr", {}, element("td", {}, set.label),
    element("td", {}, element("span", { class: "pips" }, ...all.map((id) => element("span", { class: `pip ${set.members.includes(id) ? "full" : ""}` }, set.members.includes(id) ? shortName(id) : "·"))))))));
  table.querySelector("tbody").append(element("tr", {}, element("th", {}, "in both"), element("td", {}, element("span", { class: "pips" },
    ...all.map((id) => element("span", { class: `pip ${line.common.includes(id) ? "full" : ""}` }, line.common.includes(id) ? shortName(id) : "·"))))));
  return element("div", { class: "quorums" }, element("h3", {}, "Why they cannot miss each other"), table, element("p", {}, line.text));
}

function describe(line, trace) {
  const rows = [];
  const row = (name, value) => value !== undefined && value !== "" && rows.push(element("dt", {}, name), element("dd", {}, value));
  const code = (text) => element("code", {}, text);
  if (line.type === "message") {
    row("from, to", `${nameOf(line.from)} → ${nameOf(line.to)}`);
    row("sent, arrived", `${line.sent} ms, ${line.at} ms`);
    row("says", line.label);
    row("became", line.became);
  }
  const append = line.type === "append" ? line
    : line.kind === "group" ? trace.lines.find((other) => other.type === "append" && other.head === line.head && other.first === line.first) : null;
  if (append) {
    row("log", `${append.chain === "outcome" ? "outcomes of " : ""}${nameOf(append.who)}, entries ${append.first} to ${append.last}`);
    row("entries", element("ul", {}, ...append.entries.map((entry) => element("li", {}, `${entry.index}: ${entry.text}`, entry.digest ? code(` ${entry.digest.slice(0, 16)}…`) : ""))));
    if (append.attested) {
      row("head before", code(append.head_before));
      row("head after", code(append.head));
      row("statement", code(append.statement));
      row("signature", code(`${append.signature} (the simulator's stand-in)`));
      row("verifies", append.verifies ? element("span", { class: "yes" }, "✓ yes: these entries, at these indexes, in this log") : element("span", { class: "no" }, "✖ no"));
    } else {
      row("signature", code(`${append.signature.slice(0, 64)}… (the simulator's stand-in)`));
      row("verifies", element("span", {}, element("span", { class: append.verifies ? "yes" : "no" }, append.verifies ? "✓ signed by its author" : "✖ no"), "; attested by no log: its author may sign something else for somebody else"));
    }
  } else if (line.type !== "message") {
    if (line.text) row(line.type === "verdict" ? "verdict" : "note", line.text);
    if (line.digest) row("batch", code(line.digest));
    if (line.type === "verdict") {
      row("expected", line.expected);
      row("happened", line.happened);
    }
  }
  return [element("h3", {}, append ? "Attestation" : line.type === "message" ? "Message" : "Details"), element("dl", {}, ...rows)];
}
