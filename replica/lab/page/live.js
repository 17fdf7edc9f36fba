// A live cluster: the ends of its logs, and what its replicas think of each other. It can only look.

import { complain, load } from "./app.js";
import { element } from "./panel.js";
import { KINDS } from "./trace.js";

const PAUSE_MS = 2000;
const SIGNS = { trusted: "✓", suspected: "?", exposed: "✖", "trusted part broken": "✖✖", broken: "✖✖" };

export function enter(root) {
  const look = async () => {
    if (root.hidden || !root.isConnected) return;
    try {
      const found = JSON.parse(await load("api/live"));
      complain("");
      show(root, found);
    } catch (error) {
      complain(`the cluster cannot be looked at now: ${error.message}`);
    }
    setTimeout(look, PAUSE_MS);
  };
  look();
}

function show(root, found) {
  root.replaceChildren(
    element("h2", {}, `Cluster ${found.name}: n = ${found.n}, f = ${found.f}, ${found.ordering}`),
    element("p", {}, "The entries are read from the replicas' stores and verified here. Views, slots and verdicts are each replica's own word. Nothing here changes anything."),
    ...(found.problem ? [element("p", { class: "no" }, found.problem)] : []),
    element("div", { class: "wide" }, element("table", { class: "words" },
      element("thead", {}, element("tr", {}, ...["replica", "view", "executed", "stable", "log", "thinks of the logs 0 to n−1", "remark"].map((title) => element("th", {}, title)))),
      element("tbody", {}, ...found.replicas.map((replica) => row(replica))))),
    ...found.logs.map(log));
  for (const end of root.querySelectorAll(".log")) end.scrollLeft = end.scrollWidth;
}

function row(replica) {
  const known = (value) => (value === null || value === undefined ? "–" : String(value));
  const verdicts = replica.verdicts.map((verdict) => element("span", { class: `verdict ${verdict.verdict === "trusted" ? "yes" : "no"}`, title: verdict.text || verdict.verdict },
    `${verdict.replica}${SIGNS[verdict.verdict] || verdict.verdict} `));
  const doubts = replica.verdicts.filter((verdict) => verdict.verdict !== "trusted").map((verdict) => `${verdict.replica} is ${verdict.verdict}: ${verdict.reason || ""}`);
  const remarks = [replica.reachable ? "" : `not reachable: ${replica.problem}`, replica.mute || "", ...doubts].filter(Boolean).join("; ");
  return element("tr", { class: replica.reachable ? "" : "away" }, element("td", {}, `${replica.number}${replica.primary === replica.number ? " (primary)" : ""}`),
    element("td", {}, known(replica.view)), element("td", {}, known(replica.executed)), element("td", {}, known(replica.stable)),
    element("td", {}, `${known(replica.log.last)} ${replica.log.backend ? `(${replica.log.backend})` : ""}`), element("td", {}, ...verdicts), element("td", {}, remarks));
}

function log(one) {
  const groups = one.groups.map((group) => element("div", { class: "group", title: `entries ${group.first} to ${group.last}, head ${group.head}` },
    ...shorten(group.entries).map(([kind, text]) => element("span", { class: `entry ${(KINDS[kind] || ["other"])[0]}` }, text)),
    element("code", {}, `#${group.head.slice(0, 8)}`)));
  const held = one.held_by === null || one.held_by === one.log ? "" : ` (as replica ${one.held_by} holds it)`;
  return element("section", {}, element("h3", {}, `Log of replica ${one.log}${held}`),
    one.problem ? element("p", {}, one.problem) : element("div", { class: "log", tabindex: "0", role: "region", "aria-label": `End of log ${one.log}` }, ...groups));
}

function shorten(entries) {
  if (entries.length <= 3) return entries.map((entry) => [entry.kind, `${entry.index} ${entry.text}`]);
  const first = entries[0], last = entries[entries.length - 1];
  return [[first.kind, `${first.index}–${last.index}: ${first.text} … ${last.text}`]];
}
