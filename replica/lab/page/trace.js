// A trace as the page needs it: which lines are steps, and what stands where in the diagram.

export const KINDS = {
  "PRE-PREPARE": ["propose", "PRE-PREPARE"], "PREPARE": ["prepare", "PREPARE"], "COMMIT": ["commit", "COMMIT"],
  "CHECKPOINT": ["point", "CHECKPOINT"], "SUSPECT": ["suspect", "SUSPECT"], "VIEW-CHANGE": ["change", "VIEW-CHANGE"],
  "NEW-VIEW": ["open", "NEW-VIEW"], "OUTCOME": ["outcome", "OUTCOME"],
};
const STORY = new Set(["append", "execute", "view", "ask", "answer", "note", "violation", "quorums", "verdict"]);
const CHAR = 6.4, ROW = 48, TOP = 38, MARKS = 22, CLIENT = 40;

export function parse(text) {
  const lines = text.split("\n").filter(Boolean).map((line) => JSON.parse(line));
  const header = lines[0], verdict = lines[lines.length - 1];
  const found = new Set();
  for (const line of lines) {
    // One sign for all that is found wrong at a time.
    if (line.type === "violation") line.isRepeated = found.has(line.at);
    if (line.type === "violation") found.add(line.at);
  }
  const drawn = lines.filter((line) => line.at >= header.begins && line.type !== "header" && line.type !== "meter");
  return { lines, header, verdict, drawn, steps: (grain) => drawn.filter((line) => grain === "all" || STORY.has(line.type)) };
}

export function shortName(id) { return id.replace(/^r/, ""); }

// What a box of the log says: one entry, or a run of them.
export function boxes(append) {
  if (append.entries.length <= 3) {
    return append.entries.map((entry) => ({ entries: [entry], top: `${entry.index} ${entry.kind}`, low: place(entry) }));
  }
  const names = [...new Set(append.entries.map((entry) => entry.kind))];
  const slots = append.entries.map((entry) => entry.slot).filter((slot) => slot !== null);
  const low = slots.length ? `s${Math.min(...slots)} to s${Math.max(...slots)}` : "";
  return [{ entries: append.entries, top: `${append.first}–${append.last} ${names.slice(0, 2).join(", ")}${names.length > 2 ? " …" : ""}`, low }];
}

function place(entry) {
  const parts = [];
  if (entry.view !== null) parts.push(`v${entry.view}`);
  if (entry.slot !== null) parts.push(`s${entry.slot}`);
  if (entry.ops.length) parts.push(entry.ops.join(" ").replaceAll("'s session", " session"));
  return parts.join(" ");
}

const widthOf = (text) => text.length * CHAR;

function mark(line) {
  const ops = (line.ops || []).join(" ").replaceAll("'s session", "…") || "null";
  if (line.type === "execute") return `s${line.slot} ${ops}`;
  if (line.type === "ask") return `${line.op}?`;
  if (line.type === "answer") return `${line.op} ✓`;
  if (line.type === "view") return line.what === "entered" ? `→ v${line.view}` : `v${line.view} open`;
  if (line.type === "violation") return `✖ ${line.kind}`;
  if (line.type !== "note" || !line.who) return null;
  const log = (/log (\d+)/.exec(line.text) || /replica (\d+)/.exec(line.text) || [])[1];
  return { exposed: `⚠ exposes ${log}`, lied: `≠ ${log} not counted`, forked: `✖ log ${log} forked`, halt: "■ halts", reply: `✗ reply of ${log} not counted`,
    early: `⋯ gap in log ${log}`, fetch: `? asks ${(/asks replica (\d+)/.exec(line.text) || [])[1]}`, state: "state installed" }[line.about] || "•";
}

// Where everything stands. Lanes are rows; time runs to the right, faster where nothing happens.
export function layout(trace, room = 0) {
  let stretch = 1, arranged = arrange(trace, stretch);
  // Few things happen: there is room between them. Boxes swallow some of a gap, so it takes several rounds.
  for (let round = 0; round < 6 && arranged.width < room - 4; round += 1) {
    stretch += (room - arranged.width) / arranged.gaps;
    arranged = arrange(trace, stretch);
  }
  return arranged;
}

function arrange(trace, stretch) {
  const { header, drawn } = trace;
  const lanes = new Map();
  let y = TOP;
  for (const lane of header.lanes) {
    const appends = drawn.filter((line) => line.type === "append" && line.who === lane.id);
    const rows = [];
    for (const key of ["log0", "log1", "outcome0"]) {
      if (appends.some((line) => rowOf(line) === key)) rows.push(key);
    }
    const height = rows.length || lane.id.startsWith("r") ? MARKS + 16 + Math.max(1, rows.length) * ROW : CLIENT;
    lanes.set(lane.id, { ...lane, y, line: y + MARKS, rows, height, before: countBefore(trace, lane.id) });
    y += height;
  }
  const times = [...new Set(drawn.flatMap((line) => (line.type === "message" ? [Math.max(line.sent, header.begins), line.at] : [line.at])))].sort((a, b) => a - b);
  const byTime = new Map(times.map((time) => [time, []]));
  for (const line of drawn) byTime.get(line.at).push(line);
  const end = new Map(), xs = new Map(), places = new Map();
  let x = 46, gaps = 0, previous = header.begins;
  for (const time of times) {
    const gap = Math.min(64, 12 + 8 * Math.log2(1 + time - previous));
    gaps += gap;
    x += gap * stretch;
    previous = time;
    const here = byTime.get(time);
    for (const line of here) for (const key of keysOf(line, lanes)) x = Math.max(x, (end.get(key) || 0) + 8);
    xs.set(time, x);
    for (const line of here) {
      const [key] = keysOf(line, lanes);
      if (!key || line.isRepeated) continue;
      const at = Math.max(x, (end.get(key) || 0) + 4);
      const width = line.type === "append"
        ? boxes(line).reduce((sum, box) => sum + boxWidth(box), 0) + 6
        : widthOf(mark(line)) + 18;
      places.set(line.step, { x: at, width });
      end.set(key, at + width);
    }
  }
  const right = Math.max(x + 40, ...end.values()) + 24;
  return { lanes, xs, places, width: right, height: y + 10, mark, gaps };
}

export function rowOf(line) { return line.chain === "outcome" ? "outcome0" : `log${line.copy}`; }
export function boxWidth(box) { return Math.max(widthOf(box.top), widthOf(box.low), 40) + 10; }

function keysOf(line, lanes) {
  if (line.type === "append") return [`${line.who} ${rowOf(line)}`];
  if (line.type === "violation") return ["violations"];
  if (line.who && lanes.has(line.who) && mark(line) !== null) return [`${line.who} marks`];
  return [];
}

function countBefore(trace, id) {
  return Math.max(0, ...trace.lines.filter((line) => line.type === "append" && line.who === id && line.at < trace.header.begins && line.chain === "log").map((line) => line.last));
}

// What has been counted up to a step: the newest slots, per replica.
export function metersAt(trace, step) {
  const found = new Map();
  for (const line of trace.lines) {
    if (line.step > step) break;
    if (line.type === "meter" && line.at >= trace.header.begins) {
      found.set(`${line.who} ${line.view} ${line.slot} ${line.phase}`, line);
    }
  }
  const slots = [...new Set([...found.values()].map((line) => line.slot))].sort((a, b) => b - a);
  return { slot: slots[0], meters: [...found.values()].filter((line) => line.slot === slots[0] && line.voters.length) };
}

export function inWords(line) {
  if (!line) return "";
  if (line.type === "append") {
    const said = line.entries.map((entry) => entry.text).join("; ");
    const how = !line.attested ? (line.copy ? "signs for others:" : "signs:")
      : `appends ${line.chain === "outcome" ? "to its log of outcomes " : ""}${line.first}${line.last > line.first ? "–" + line.last : ""}${line.copy ? ", with the second copy of its log" : ""}:`;
    return `${how} ${said}`;
  }
  if (line.type === "execute") return `executes slot ${line.slot}: ${line.ops.join(" ") || "null"}`;
  if (line.type === "ask") return `asks for ${line.op}`;
  if (line.type === "answer") return `is answered: ${line.op} was executed in slot ${line.slot}`;
  if (line.type === "message") {
    const fate = { read: "", waits: " (waits for its causes)", early: " (a gap lies before it)", lost: " (lost)", ignored: " (not counted)",
      forked: " (contradicts what was read)", refused: " (does not verify)" }[line.became] || "";
    return `hears from ${nameOf(line.from)}: ${line.label}${fate}`;
  }
  return line.text || "";
}

export function nameOf(id) { return id.startsWith("r") ? `replica ${id.slice(1)}` : `client ${id}`; }
