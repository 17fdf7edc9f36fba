// "Break it": the visitor plays the faulty replica. A play is its moves; the server runs them from the beginning.

import { complain, load, present, roomFor, writeAddress } from "./app.js";
import { element, Panel } from "./panel.js";
import { parse } from "./trace.js";

const KINDS = {
  "PRE-PREPARE": ["view", "slot", "batch"], "PREPARE": ["view", "slot", "batch"], "COMMIT": ["view", "slot", "batch"],
  "SUSPECT": ["view"], "VIEW-CHANGE": ["view"], "NEW-VIEW": ["view"], "CHECKPOINT": ["slot"],
};
const BATCHES = { A: "what A asks for", B: "what B asks for", null: "nothing (null)", proposed: "what was proposed there" };
let play = { system: "three-phase", beside: "", replica: 0, moves: [] };
let slot = 5;

const append = (kind, more, show) => ({ do: "append", kind, ...more, show });

// Attacks to begin with. s: the next free slot; n: how many replicas there are.
const PRESETS = {
  "Say one thing to some, another to others": [0, (s, n) => {
    const first = n > 3 ? [2, 3] : [1], second = n > 3 ? [1] : [2];
    return [["A", first, 0], ["B", second, 1]].flatMap(([batch, show, copy]) => [append("PRE-PREPARE", { view: 0, slot: s, batch, copy }, show), append("COMMIT", { view: 0, slot: s, batch, copy }, show)]);
  }],
  "One after the other, each shown to some": [0, (s, n) => {
    const first = n > 3 ? [2, 3] : [1], second = n > 3 ? [1] : [2];
    return [["A", first], ["B", second]].flatMap(([batch, show]) => [append("PRE-PREPARE", { view: 0, slot: s, batch }, show), append("COMMIT", { view: 0, slot: s, batch }, show)]);
  }],
  "Hide a vote, then open the next view": [1, (s, n) => {
    const victims = [...Array(n - 2).keys()].map((i) => i + 2);
    const commits = [...Array(s - 1).keys()].map((i) => append("COMMIT", { view: 1, slot: i + 1, batch: "proposed" }, victims));
    return [append("PREPARE", { view: 0, slot: s, batch: "proposed" }, [0]), append("COMMIT", { view: 0, slot: s, batch: "proposed" }, [0]),
      { do: "wait", ms: 1300 }, append("SUSPECT", { view: 0 }, victims), append("VIEW-CHANGE", { view: 1 }, victims), { do: "wait", ms: 300 },
      append("NEW-VIEW", { view: 1 }, victims), append("PRE-PREPARE", { view: 1, slot: s, batch: "B" }, victims), ...commits, append("COMMIT", { view: 1, slot: s, batch: "B" }, victims)];
  }],
  "Skip a slot": [0, (s, n) => [append("PRE-PREPARE", { view: 0, slot: s + 1, batch: "A" }, [...Array(n - 1).keys()].map((i) => i + 1))]],
  "Say nothing": [0, () => []],
  "Behave": [0, () => [{ do: "behave" }]],
};

let root, state, systems;

export async function enter(node, shared, known) {
  [root, state, systems] = [node, shared, known];
  let problem = "";
  try {
    if (state.moves) play = { ...play, ...playOf(JSON.parse(state.moves)) };
  } catch {
    problem = "the address names moves that cannot be read, so there are none";
  }
  draw();
  await run(state.step);
  if (problem) complain(problem);
}

// What an address may say of a play; the server judges the moves themselves.
function playOf(found) {
  const { system, beside, replica, moves } = { ...play, ...found };
  const names = systems.map((one) => one.name);
  const areMoves = Array.isArray(moves) && moves.every((move) => move && typeof move === "object" && Array.isArray(move.show ?? []));
  if (!areMoves || !names.includes(system) || !["", ...names].includes(beside) || ![0, 1].includes(replica)) throw new Error("no play");
  return { system, beside, replica, moves };
}

const systemOf = (name) => systems.find((system) => system.name === name) || systems[0];

async function run(step) {
  state.moves = JSON.stringify(play);
  writeAddress();
  const names = [play.system, play.beside].filter(Boolean);
  const query = (name) => new URLSearchParams({ system: name, replica: play.replica, seed: state.seed, moves: JSON.stringify(play.moves.map((move) => fit(move, name))) });
  try {
    complain("");
    const texts = await Promise.all(names.map((name) => load(`api/play?${query(name)}`)));
    const room = roomFor(names.length);
    const panels = texts.map((text, i) => new Panel({ trace: parse(text), text, room, shiviz: `api/play/shiviz?${query(names[i])}` }));
    slot = nextSlot(panels[0].trace);
    present(panels, step || 1e9);
    result(panels);
  } catch (error) {
    complain(error.message);
  }
}

// A move names replicas of the first system; the second may have fewer.
function fit(move, name) {
  return move.show ? { ...move, show: move.show.filter((peer) => peer < systemOf(name).n) } : move;
}

function nextSlot(trace) {
  const done = trace.lines.filter((line) => line.type === "execute" && line.at < 190).map((line) => line.slot);
  return Math.max(0, ...done) + 1;
}

function result(panels) {
  const found = panels.map((panel) => {
    const { verdict, header } = panel.trace;
    return element("li", {}, element("strong", { class: verdict.safe ? "yes" : "no" }, `${header.system}: `), `${verdict.happened}.`);
  });
  root.querySelector(".result").replaceChildren(...found);
}

function change(moves) {
  play.moves = moves;
  draw();
  run(1e9);
}

function draw() {
  const n = systemOf(play.system).n, peers = [...Array(n).keys()].filter((number) => number !== play.replica);
  const keep = root.querySelector(".result");
  root.replaceChildren(
    element("h2", {}, "You are the faulty replica"),
    element("p", {}, "Clients A and B ask for A2 and B2. Say what you like, to whom you like; the other replicas are correct. Your log takes what you append, once at each index."),
    element("div", { class: "row" }, choose("System", "system", systems, play.system), choose("beside", "beside", [{ name: "", title: "nothing" }, ...systems], play.beside), whom()),
    element("p", { class: "differs" }, `What differs from the product: ${systemOf(play.system).differs}.`),
    element("div", { class: "row" }, "Begin with: ", ...Object.entries(PRESETS).map(([name, [replica, make]]) => button(name, () => { play.replica = replica; change(make(slot, systemOf(play.system).n)); }))),
    element("div", { class: "playing" }, builder(peers), element("ol", { class: "moves" }, ...play.moves.map((move, place) => element("li", {}, `${place + 1}. ${words(move)}`,
      button("remove", () => change(play.moves.filter((_, other) => other !== place)), `Remove move ${place + 1}`))))),
    keep || element("ul", { class: "result", "aria-live": "polite" }),
  );
}

function button(text, onclick, label) {
  return element("button", { type: "button", onclick, "aria-label": label }, text);
}

function choose(label, key, options, value) {
  const select = element("select", { id: `play-${key}`, onchange: (event) => { play[key] = event.target.value; change(play.moves); } },
    ...options.map((option) => element("option", { value: option.name, selected: option.name === value }, option.title)));
  return element("label", {}, label, select);
}

function whom() {
  const select = element("select", { id: "play-replica", onchange: (event) => { play.replica = Number(event.target.value); change([]); } },
    ...[[0, "replica 0, the primary"], [1, "replica 1, the next primary"]].map(([number, text]) => element("option", { value: number, selected: number === play.replica }, text)));
  return element("label", {}, "You are", select);
}

function builder(peers) {
  const kind = element("select", { id: "move-kind", "aria-label": "Entry", onchange: () => fields() }, ...Object.keys(KINDS).map((name) => element("option", {}, name)));
  const number = (id, value) => element("input", { id, type: "number", min: 0, max: 60, value, style: "width:4.5rem" });
  const inputs = { view: number("move-view", 0), slot: number("move-slot", slot), batch: element("select", { id: "move-batch" }, ...Object.entries(BATCHES).map(([value, text]) => element("option", { value }, text))) };
  const labels = Object.entries(inputs).map(([name, input]) => [name, element("label", {}, name, input)]);
  const fields = () => labels.forEach(([name, label]) => { label.hidden = !KINDS[kind.value].includes(name); });
  const shows = peers.map((peer) => [peer, element("input", { type: "checkbox", checked: true, id: `show-${peer}` })]);
  const show = () => shows.filter(([, box]) => box.checked).map(([peer]) => peer);
  const copy = element("input", { type: "checkbox", id: "move-copy" });
  const mayCopy = systems.some((system) => system.may_copy && [play.system, play.beside].includes(system.name));
  const say = () => {
    const more = Object.fromEntries(KINDS[kind.value].map((name) => [name, name === "batch" ? inputs.batch.value : Number(inputs[name].value)]));
    if (mayCopy && copy.checked) more.copy = 1;
    change([...play.moves, append(kind.value, more, show())]);
  };
  fields();
  return element("fieldset", {}, element("legend", {}, "Your next move"),
    element("div", { class: "row" }, kind, ...labels.map(([, label]) => label),
      element("span", {}, "show to ", ...shows.map(([peer, box]) => element("label", {}, box, `replica ${peer}`))),
      mayCopy ? element("label", {}, copy, "with the second copy") : null, button("Append", say)),
    element("div", { class: "row" }, button("Show them my whole log", () => change([...play.moves, { do: "show", show: show() }])),
      button("Wait 300 ms", () => change([...play.moves, { do: "wait", ms: 300 }])), button("Behave from now on", () => change([...play.moves, { do: "behave" }])),
      button("Start over", () => change([]))));
}

function words(move) {
  const to = move.show && move.show.length ? `to ${move.show.join(", ")}` : "to nobody";
  if (move.do === "wait") return `wait ${move.ms} ms`;
  if (move.do === "behave") return "behave from now on";
  if (move.do === "show") return `show my log ${to}`;
  const parts = [move.view !== undefined ? `v${move.view}` : "", move.slot !== undefined ? `s${move.slot}` : "", move.batch ? `(${move.batch})` : ""];
  return `append ${move.kind} ${parts.filter(Boolean).join(" ")}, shown ${to}${move.copy ? ", with the second copy" : ""}`;
}

