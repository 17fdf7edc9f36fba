// The page: what is chosen stands in the address bar; the server runs it; the player steps through it.

import { element, Panel } from "./panel.js";
import { STYLE } from "./diagram.js";
import { KINDS, parse } from "./trace.js";

const $ = (id) => document.getElementById(id);
const STEP_MS = 700;
const WIDE = matchMedia("(min-width: 1200px)");
const state = { mode: "watch", scenario: "", beside: "", seed: 1, step: 0, grain: "story", speed: "1", moves: "", system: "" };
const player = { panels: [], timeline: [], at: 0, timer: null };

// What stands in the address bar.

function readAddress() {
  const asked = new URLSearchParams(location.search);
  for (const key of Object.keys(state)) {
    if (asked.has(key)) state[key] = typeof state[key] === "number" ? Number(asked.get(key)) || 0 : asked.get(key);
  }
}

export function writeAddress() {
  const said = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) if (value !== "" && value !== undefined) said.set(key, value);
  history.replaceState(null, "", `?${said}`);
}

// Running.

export function complain(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text || "";
}

export async function load(path) {
  const answer = await fetch(path);
  const text = await answer.text();
  if (answer.ok) return text;
  let said = `the server answered ${answer.status}`;
  try { said = JSON.parse(text).error.message; } catch { /* then the status must do */ }
  throw new Error(said);
}

async function runScenarios() {
  const names = [state.scenario, state.beside].filter(Boolean);
  const seed = encodeURIComponent(state.seed);
  const texts = await Promise.all(names.map((name) => load(`api/trace/${encodeURIComponent(name)}?seed=${seed}`)));
  const room = roomFor(names.length);
  present(texts.map((text, i) => new Panel({ trace: parse(text), text, room, shiviz: `api/shiviz/${encodeURIComponent(names[i])}?seed=${seed}` })));
}

// How wide a diagram may be without scrolling.
export function roomFor(panels) {
  const page = document.documentElement.clientWidth - (WIDE.matches || document.documentElement.clientWidth > 640 ? 34 : 10);
  return (panels > 1 && WIDE.matches ? (page - 12) / 2 : page) - (document.documentElement.clientWidth > 640 ? 92 : 72);
}

// Put panels on the page, and begin at the step that the address names.
export function present(panels, step = state.step) {
  pause();
  player.panels = panels;
  $("panels").replaceChildren(...panels.map((panel) => panel.node));
  $("panels").className = panels.length > 1 ? "two" : "";
  for (const panel of panels) panel.node.classList.toggle("beside", panels.length > 1);
  retime();
  go(step);
}

function retime() {
  player.timeline = player.panels.flatMap((panel, index) => panel.trace.steps(state.grain).map((line) => ({ index, line })));
  player.timeline.sort((a, b) => a.line.at - b.line.at || a.index - b.index || a.line.step - b.line.step);
  $("slider").max = player.timeline.length;
}

// Go to a place in the timeline; 0 is before everything.
export function go(at) {
  player.at = Math.max(0, Math.min(player.timeline.length, at));
  const reached = player.panels.map(() => 0);
  for (const { index, line } of player.timeline.slice(0, player.at)) reached[index] = line.step;
  player.panels.forEach((panel, index) => panel.show(reached[index]));
  const now = player.timeline[player.at - 1];
  $("clock").textContent = `${now ? now.line.at : player.panels.length ? player.panels[0].trace.header.begins : 0} ms`;
  $("slider").value = player.at;
  $("slider").setAttribute("aria-valuetext", `step ${player.at} of ${player.timeline.length}`);
  state.step = player.at;
  writeAddress();
  if (player.at === player.timeline.length) pause();
}

function play() {
  if (player.at === player.timeline.length) go(0);
  const next = () => {
    go(player.at + 1);
    if (player.timer !== null) player.timer = setTimeout(next, STEP_MS / Number(state.speed));
  };
  player.timer = setTimeout(next, 50);
  $("play").textContent = "Pause";
  $("play").setAttribute("aria-label", "Pause");
}

export function pause() {
  clearTimeout(player.timer);
  player.timer = null;
  $("play").textContent = "Play";
  $("play").setAttribute("aria-label", "Play");
}

const toggle = () => (player.timer === null ? play() : pause());

function goToTheDecisiveStep() {
  const wanted = player.panels.map((panel) => panel.trace.verdict.decided_by);
  const before = (place) => place > player.at;
  const places = player.timeline.map(({ index, line }, place) => (wanted[index] !== null && line.step >= wanted[index] ? [index, place + 1] : null)).filter(Boolean);
  const firsts = player.panels.map((_, index) => places.find(([of]) => of === index)).filter(Boolean).map(([, place]) => place).sort((a, b) => a - b);
  if (firsts.length) go(firsts.find(before) ?? firsts[0]);
}

// Light and dark.

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("theme", name); } catch { /* not everybody lets a page remember */ }
}

function firstTheme() {
  let known = null;
  try { known = localStorage.getItem("theme"); } catch { /* see above */ }
  return known || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

const bounded = (seed) => Math.floor(Math.max(0, Math.min(1000000, Number(seed) || 0)));
const otherTheme = () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

// The page.

function legend() {
  const box = (kind) => `<svg width="34" height="16"><style>${STYLE}</style><rect class="box ${kind}" x="1" y="1" width="32" height="14" rx="3"/></svg>`;
  const items = Object.values(KINDS).map(([kind, name]) => [box(kind), name]);
  const arrow = (name, more) => `<svg width="40" height="16"><path class="message ${name}" d="M2 8 L36 8"/>${more}</svg>`;
  items.push([arrow("", '<path class="head" d="M38 8 l-9 -3.6 l0 7.2 Z"/>'), "a group of log entries"]);
  items.push([arrow("dim", '<path class="head dim" d="M38 8 l-9 -3.6 l0 7.2 Z"/>'), "request, reply"]);
  items.push([arrow("early", '<circle class="head early" cx="34" cy="8" r="4.5"/>'), "cannot be read yet: a gap, or a cause is missing"]);
  items.push([arrow("lost", '<path class="message lost" d="M14 3 l10 10 m-10 0 l10 -10"/>'), "lost"]);
  items.push(['<svg width="18" height="16"><path class="diamond" d="M3 8 l6 -6 l6 6 l-6 6 Z"/></svg>', "executes"]);
  items.push(['<svg width="34" height="16"><rect class="box commit signed" x="1" y="1" width="32" height="14" rx="3"/></svg>', "dashed: only signed, attested by no log"]);
  items.push(['<svg width="34" height="16"><rect class="box commit copy" x="1" y="1" width="31" height="14" rx="3"/></svg>', "thick, lower row: said to others, or with a second copy of the log"]);
  $("legend").innerHTML = items.map(([drawn, text]) => `<li>${drawn}${text}</li>`).join("");
}

async function start() {
  setTheme(firstTheme());
  legend();
  readAddress();
  const { scenarios, systems, live } = JSON.parse(await load("api/scenarios"));
  const options = (first) => [...(first ? [element("option", { value: "" }, first)] : []), ...scenarios.map((s) => element("option", { value: s.name }, s.title))];
  $("scenario").append(...options());
  $("beside").append(...options("nothing"));
  // Whatever else an address says: it was typed, or cut off.
  const known = (id) => [...$(id).options].some((option) => option.value === state[id]);
  for (const id of ["beside", "speed", "grain"]) if (!known(id)) state[id] = [...$(id).options].find((option) => option.defaultSelected)?.value ?? "";
  state.seed = bounded(state.seed);
  if (!["watch", "break", ...(live ? ["live"] : [])].includes(state.mode)) state.mode = "watch";
  if (!scenarios.some((s) => s.name === state.scenario)) state.scenario = live && state.mode === "live" ? "" : scenarios[0].name;
  document.querySelector("[data-mode=live]").hidden = !live;
  if (live && !new URLSearchParams(location.search).has("mode")) state.mode = "live";
  for (const id of ["scenario", "beside", "seed", "speed", "grain"]) $(id).value = state[id];
  listen(systems);
  await enter(state.mode, systems, true);
}

async function enter(mode, systems, keepStep = false) {
  pause();
  complain("");
  state.mode = mode;
  if (!keepStep) state.step = 0;
  for (const button of document.querySelectorAll("[data-mode]")) button.setAttribute("aria-current", button.dataset.mode === mode);
  $("choice").hidden = mode !== "watch";
  $("breaker").hidden = mode !== "break";
  $("live").hidden = mode !== "live";
  $("controls").hidden = mode === "live";
  $("panels").replaceChildren();
  try {
    if (mode === "watch") await runScenarios();
    else if (mode === "break") (await import("./breaker.js")).enter($("breaker"), state, systems);
    else (await import("./live.js")).enter($("live"));
  } catch (error) {
    complain(error.message);
  }
}

function listen(systems) {
  const rerun = () => {
    Object.assign(state, { scenario: $("scenario").value, beside: $("beside").value, seed: bounded($("seed").value), step: 0 });
    $("seed").value = state.seed;
    enter("watch", systems);
  };
  $("choice").addEventListener("submit", (event) => { event.preventDefault(); rerun(); });
  for (const id of ["scenario", "beside"]) $(id).addEventListener("change", rerun);
  for (const button of document.querySelectorAll("[data-mode]")) button.addEventListener("click", () => enter(button.dataset.mode, systems));
  $("first").addEventListener("click", () => go(0));
  $("back").addEventListener("click", () => { pause(); go(player.at - 1); });
  $("play").addEventListener("click", toggle);
  $("forward").addEventListener("click", () => { pause(); go(player.at + 1); });
  $("last").addEventListener("click", () => go(player.timeline.length));
  $("decisive").addEventListener("click", goToTheDecisiveStep);
  $("slider").addEventListener("input", () => { pause(); go(Number($("slider").value)); });
  $("speed").addEventListener("change", () => { state.speed = $("speed").value; writeAddress(); });
  $("grain").addEventListener("change", () => {
    const at = player.timeline[player.at - 1]?.line.at ?? -1;
    state.grain = $("grain").value;
    retime();
    go(player.timeline.filter(({ line }) => line.at <= at).length);
  });
  $("theme").addEventListener("click", otherTheme);
  $("help-button").addEventListener("click", help);
  addEventListener("keydown", key);
  let resized = null;
  let width = document.documentElement.clientWidth;
  addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(() => {
      if (document.documentElement.clientWidth === width) return;
      width = document.documentElement.clientWidth;
      for (const panel of player.panels) panel.redraw(roomFor(player.panels.length));
      if (player.panels.length) go(player.at);
    }, 200);
  });
}

function help() {
  $("help").hidden = !$("help").hidden;
  $("help-button").setAttribute("aria-expanded", String(!$("help").hidden));
}

function key(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.key === " " && /^(BUTTON|A|SUMMARY)$/.test(event.target.tagName)) return;
  const speeds = [...$("speed").options].map((option) => option.value);
  const faster = (by) => {
    $("speed").value = speeds[Math.max(0, Math.min(speeds.length - 1, speeds.indexOf($("speed").value) + by))];
    state.speed = $("speed").value;
  };
  const does = {
    ArrowRight: () => { pause(); go(player.at + 1); }, ArrowLeft: () => { pause(); go(player.at - 1); }, " ": toggle,
    Home: () => go(0), End: () => go(player.timeline.length), d: goToTheDecisiveStep, t: otherTheme, "?": help,
    "+": () => faster(1), "-": () => faster(-1),
  }[event.key];
  if (!does || (state.mode === "live" && event.key !== "t" && event.key !== "?")) return;
  event.preventDefault();
  does();
}

start().catch((error) => complain(error.message));
