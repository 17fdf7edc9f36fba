"""Two quorums of one run, drawn: the one that decided a request and the one that opened the next view."""

from replica.lab.pbft_stage import PbftStage
from replica.lab.stage import LabStage
from replica.lab.trace import Trace, numbered


def _draw(trace: Trace, named: list[str], faulty: set[str], why: str, at_ms: int) -> None:
    met = (m for m in trace.of("meter") if m["ops"] == ["A2"] and m["phase"] == "commit")
    decided = next((m["voters"] for m in met if len(m["voters"]) >= m["need"]), None)
    if decided is None or not named:
        return  # then it did not come as expected, and the verdict says so
    common = [name for name in decided if name in named]
    sets = [{"label": "decided A2", "members": decided}, {"label": "opened view 1", "members": named}]
    mark = " (faulty)" if set(common) <= faulty else ""
    who = [", ".join(name.removeprefix("r") for name in names) for names in (decided, named, common)]
    text = f"replicas {who[0]} decided A2, {who[1]} opened view 1; in both: {who[2]}{mark}. {why}"
    trace.add("quorums", at_ms, sets=sets, common=common, text=text)


def of_logs(stage: LabStage) -> None:
    """Draw why f + 1 are enough with logs."""
    why = (
        "One replica in common is enough, faulty or not: its log holds the vote before the VIEW-CHANGE, and who "
        "reads the one has read the other (in hidden-vote-three-phase a faulty one tries). In PBFT that replica could "
        "deny it, so the two must share f+1. And f+1 equal replies are enough for a client, here as there: one of them "
        "is a correct replica's."
    )
    named = numbered(stage.facts.named.get(1, ()))
    _draw(stage.lab_trace, named, set(numbered(stage.story.faulty)), why, stage.world.now)


def of_pbft(stage: PbftStage) -> None:
    """Draw why PBFT needs 2f + 1."""
    why = "Of 3f+1 two sets of 2f+1 share f+1, so a correct one, which holds A2's certificate and hands it over."
    named: list[str] = next((line["named"] for line in stage.trace.of("view") if line["what"] == "opened"), [])
    _draw(stage.trace, named, set(numbered(stage.faulty)), why, stage.world.now)
