"""The page in a real Chromium."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chromium import Loop, chromium
from conftest import RECORDINGS
from dialogue_samples import INFO, LABELS, record_session, utterance
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect
from recording_control import RecordingControl

from stream_hbaf.config import DashboardConfig, SourceConfig
from stream_hbaf.dashboard.server import Dashboard
from stream_hbaf.events import (
    AnyEvent,
    Emotion,
    Feedback,
    Level,
    Partial,
    Privacy,
    Status,
    Switch,
    Utterance,
)
from stream_hbaf.live.runtime import redact

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
JFK = RECORDINGS / "jfk.flac"

expect.set_options(timeout=20_000)  # for what takes 0.1 s on a machine that isn't busy


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def control() -> RecordingControl:
    return RecordingControl(labels=LABELS)


class Served:
    """A dashboard that runs beside the browser."""

    def __init__(self, loop: Loop, dashboard: Dashboard) -> None:
        self.loop = loop
        self.dashboard = dashboard
        self.address = dashboard.address

    def send(self, *events: AnyEvent) -> None:
        for event in events:
            self.loop.run(self.dashboard.send(event))


@contextmanager
def serve(
    control: RecordingControl | None,
    *,
    sessions: Path | None = None,
    port: int = 0,
    token: str | None = None,
) -> Iterator[Served]:
    async def open_dashboard() -> Dashboard:
        config = DashboardConfig.model_validate({"port": port, "token": token})
        dashboard = Dashboard(config, info=INFO, control=control, sessions=sessions)
        await dashboard.start()
        return dashboard

    with Loop() as loop:
        dashboard = loop.run(open_dashboard())
        yield Served(loop, dashboard)
        loop.run(dashboard.close(1))


@contextmanager
def page_at(
    browser: Browser, address: str, *, size: dict[str, int] = DESK, scheme: str = "light"
) -> Iterator[Page]:
    """An open page; fails in the end if it logged an error or loaded a file from elsewhere."""
    context = browser.new_context(viewport=size, color_scheme=scheme, permissions=["microphone"])  # type: ignore[arg-type]
    page = context.new_page()
    errors: list[str] = []
    urls: list[str] = []

    def log(line: ConsoleMessage) -> None:
        if line.type == "error":
            errors.append(line.text)

    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", log)
    page.on("request", lambda request: urls.append(request.url))
    page.goto(address)
    expect(page.get_by_text("● Connected")).to_be_visible()
    yield page
    own = address.partition("?")[0]
    assert [url for url in urls if not url.startswith(own)] == []
    assert [line for line in errors if "WebSocket connection" not in line] == []
    context.close()


def test_running_transcript_becomes_a_finished_utterance(
    browser: Browser, control: RecordingControl
) -> None:
    """The running transcript with a provisional emotion gives way to the finished utterance."""
    with serve(control) as served, page_at(browser, served.address) as page:
        expect(page.get_by_text("No utterances yet")).to_be_visible()
        running = page.get_by_role("region", name="Now")
        served.send(
            utterance(1).model_copy(update={"type": "new", "rev": 1, "text": "", "emotion": None})
        )
        expect(running).to_contain_text("Ann …")
        served.send(
            Partial(
                id="d-1",
                source="ann",
                dialogue_id="d",
                speaker="Ann",
                text="I got the",
                modalities=["text"],
                emotion=Emotion(label="joy", score=0.5),
            )
        )
        expect(running).to_contain_text("Ann J? perhaps joy: I got the")
        served.send(utterance(1, text="I got the job!", conflict=True))
        item = page.get_by_role("listitem").filter(has_text="I got the job!")
        expect(item).to_contain_text("joy 70 %")
        expect(item).to_contain_text("≠ voice and words contradict")
        expect(running).not_to_contain_text("I got the")
        expect(page.get_by_text("No utterances yet")).to_be_hidden()


def test_only_finished_utterances_are_announced(
    browser: Browser, control: RecordingControl
) -> None:
    """Screen readers announce each utterance once, and no running transcripts."""
    with serve(control) as served, page_at(browser, served.address) as page:
        live = page.locator("[aria-live=polite]")
        served.send(
            utterance(1).model_copy(update={"type": "update", "rev": 2, "text": "Sentence"})
        )
        served.send(utterance(1), utterance(2, "anger"))
        expect(live.locator("p")).to_have_text(
            ["Ann, joy 70 %: Sentence 1.", "Ann, anger 70 %: Sentence 2."]
        )


def test_abstention_is_shown_as_unsure(browser: Browser, control: RecordingControl) -> None:
    """An abstention is marked wherever its label is shown, and its set is listed."""
    unsure = utterance(1, score=0.4)
    assert unsure.emotion is not None
    emotion = unsure.emotion.model_copy(update={"abstained": True, "set": ["joy", "surprise"]})
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(unsure.model_copy(update={"emotion": emotion}))
        details = page.get_by_role("region", name="Newest utterance")
        expect(details).to_contain_text("J? unsure, perhaps joy 40 %")
        expect(details).to_contain_text("Too unsure to rely on.")
        expect(details).to_contain_text("It may be any of: joy, surprise.")
        expect(page.locator(".block text")).to_have_text(["J?"])
        legend = page.get_by_role("list", name="Emotions").get_by_role("listitem")
        expect(legend.filter(has_text="joy")).to_have_text("J joy 0")
        expect(legend.filter(has_text="unsure")).to_have_text("? unsure 1")


def test_withheld_transcript_is_not_called_missing(
    browser: Browser, control: RecordingControl
) -> None:
    """Under privacy ``no_text`` the page says that there were words."""
    with serve(control) as served, page_at(browser, served.address) as page:
        modes: list[Privacy] = ["no_text", "label_only"]
        for turn, privacy in enumerate(modes):
            redacted = redact(utterance(turn), privacy)
            assert redacted is not None
            served.send(redacted)
        words = page.locator(".utterance .words")
        expect(words).to_have_text(["(no words)", "(words are kept back)"])
        expect(page.get_by_role("region", name="Newest utterance")).to_contain_text("J joy")


def test_details_have_probabilities_contributions_and_latencies(
    browser: Browser, control: RecordingControl
) -> None:
    """Each is a table with a caption."""
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(utterance(1))
        shares = page.get_by_role("table", name="Probabilities")
        expect(shares.get_by_role("row").nth(1)).to_have_text("J joy70 %")
        expect(shares.get_by_role("row")).to_have_count(8)
        why = page.get_by_role("table", name="What spoke for joy, and against")
        expect(why.get_by_role("row")).to_have_text(
            ["InputShare", "the voice+30 %", "the words−10 %", "the dialogue before+5 %"]
        )
        spent = page.get_by_role("table", name="612 ms from the end of speech to the prediction")
        expect(spent.get_by_role("row").nth(1)).to_have_text("silence that confirms the end600 ms")


def test_timeline_has_a_lane_for_each_speaker_and_a_table(
    browser: Browser, control: RecordingControl
) -> None:
    """Blocks stand in their speaker's lane, long silences are cut, and a table says the same."""
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(
            utterance(1), utterance(2, "anger", source="ben"), utterance(3, "fear", at_s=300)
        )
        expect(page.locator(".lane")).to_have_text(["Ann", "Ben"])
        blocks = page.locator(".block rect")
        expect(blocks).to_have_count(3)
        ann, ben, later = [box for box in map(Locator.bounding_box, blocks.all()) if box]
        assert ben["y"] > ann["y"] + 40
        assert later["x"] - ben["x"] < 300
        expect(page.locator(".silence")).to_have_text(["5 min"])
        timeline = page.locator("svg.timeline")
        expect(timeline).to_have_attribute("aria-label", re.compile("3 utterances of Ann, Ben"))
        page.get_by_text("The timeline as a table").click()
        rows = page.get_by_role("table", name="Finished utterances").get_by_role("row")
        expect(rows).to_have_count(4)
        expect(rows.nth(2)).to_contain_text("Benanger 70 %agreeSentence 2.")


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lane_names_and_blocks_do_not_overlap(
    browser: Browser, control: RecordingControl, size: dict[str, int], scheme: str
) -> None:
    """Wherever the timeline is scrolled to, no block is painted over a name or hidden by one."""
    long_name = "microphone with quite a long name"
    with (
        serve(control) as served,
        page_at(browser, served.address, size=size, scheme=scheme) as page,
    ):
        served.send(*(utterance(turn, source="ann" if turn % 2 else "ben") for turn in range(60)))
        served.send(utterance(60, speaker=long_name))
        expect(page.locator(".lane")).to_have_text(["Ben", "Ann", long_name])
        expect(page.locator(".block")).to_have_count(61)
        timeline = page.locator("#timeline")
        width = timeline.evaluate("timeline => timeline.scrollWidth - timeline.clientWidth")
        assert width > 0
        for share in (0, 0.5, 1):
            timeline.evaluate("(timeline, x) => { timeline.scrollLeft = x }", share * width)
            names = page.evaluate(BOXES, [".lane", "#course"])
            blocks = page.evaluate(BOXES, [".block rect", "#timeline"])
            assert len(names) == 3
            assert len(blocks) > 3
            assert max(right for _, right in names) <= min(left for left, _ in blocks)
            on_top = page.evaluate(TOPMOST_AT_NAMES)
            assert on_top == ["lane"] * 3
        timeline.evaluate("timeline => { timeline.scrollLeft = 0 }")
        first = page.locator(".block rect").first.bounding_box()
        box = timeline.bounding_box()
        assert first is not None
        assert box is not None
        assert first["x"] >= box["x"]


def test_level_and_health_are_shown(browser: Browser, control: RecordingControl) -> None:
    """The level and the state of each stage are shown as text as well."""
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(*(Level(source="ann", dbfs=-20, speech=True) for _ in range(200)))
        served.send(Status(source="ann", stage="vad", state="degraded", detail="out of memory"))
        expect(page.get_by_text("−20 dB, somebody speaks")).to_be_visible()
        expect(page.get_by_text("▲ vad degraded out of memory")).to_be_visible()
        page.wait_for_function(PAINTED)


def test_correction_by_a_click_arrives_as_feedback(
    browser: Browser, control: RecordingControl
) -> None:
    """The chosen utterance, the chosen label; the page then shows it as corrected."""
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(utterance(1), utterance(2, "anger"))
        page.get_by_role("button", name="Sentence 1.").click()
        page.get_by_role("group", name="What was it really?").get_by_role(
            "button", name="fear"
        ).click()
        expect(page.get_by_text("Saved: this was fear.")).to_be_visible()
        expect(page.get_by_role("button", name="Sentence 1.")).to_contain_text("✓ corrected")
        expect(page.locator(".block text").first).to_have_text("F✓")
    assert control.corrections == [Feedback(id="d-1", label="fear", by="page")]


def spoken(turn: int, speaker: str, score: float | None = 0.93, **more: Any) -> Utterance:
    """An ``end`` whose speaker the voice has told."""
    voice = {
        "speaker": speaker,
        "speaker_score": score,
        "speaker_source": "voice" if speaker else "",
    }
    return utterance(turn, source="table", **voice | more)


def test_a_speaker_is_put_right_by_one_click(browser: Browser, control: RecordingControl) -> None:
    """A known one or a new name, of one utterance or of all; the lanes follow what is published."""
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(spoken(1, "speaker 1"), spoken(2, "speaker 2", 0.7), spoken(3, "", 0.4))
        lanes = page.locator("#lane-names .lane")
        expect(lanes).to_have_text(["speaker 1", "speaker 2", "not sure who"])
        expect(page.get_by_role("button", name="Sentence 2.")).to_contain_text("speaker 2?")
        who = page.get_by_role("group", name="Who was it?")
        who.get_by_role("button", name="speaker 2").click()
        expect(page.get_by_text("Saved: this was speaker 2.")).to_be_visible()
        corrected = {"rev": 4, "revision": 1, "speaker_source": "corrected"}
        served.send(spoken(3, "speaker 2", 1.0, **corrected))
        expect(lanes).to_have_text(["speaker 1", "speaker 2"])
        expect(page.get_by_text("speaker 2 (by correction)")).to_be_visible()
        expect(page.locator("#announcements p")).to_have_count(3)

        page.get_by_role("button", name="Sentence 1.").click()
        expect(page.get_by_text("speaker 1 (by voice, 93 %)")).to_be_visible()
        who.get_by_label("all utterances of speaker 1 here").check()
        who.get_by_label("Another name").fill("Ann")
        who.get_by_role("button", name="Name").click()
        expect(page.get_by_text("Saved: this was Ann.")).to_be_visible()
        who.get_by_role("button", name="speaker 2").click()
        expect(page.get_by_text("Saved: this was speaker 2.")).to_be_visible()
    speaker = {"speaker": "speaker 1", "dialogue_id": "d"}
    assert control.corrections == [Feedback(id="d-3", speaker="speaker 2", by="page")]
    assert [(one.command, one.arguments) for one in control.requests if one.arguments] == [
        ("rename_speaker", {**speaker, "name": "Ann"}),
        ("merge_speakers", {**speaker, "into": "speaker 2"}),
    ]


def test_a_speaker_of_a_dialogue_that_is_over_is_put_right(
    browser: Browser, control: RecordingControl
) -> None:
    """No new end comes, so the page itself remembers the correction, as do the others."""
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(spoken(1, "speaker 1"))
        page.get_by_label("Another name").fill("Ann")
        page.get_by_role("button", name="Name").click()
        expect(page.locator("#lane-names .lane")).to_have_text(["Ann"])
        page.get_by_role("button", name="fear", exact=True).click()
        expect(page.get_by_role("button", name="Sentence 1.")).to_contain_text("✓ corrected")
        with page_at(browser, served.address) as other:
            expect(other.locator("#lane-names .lane")).to_have_text(["Ann"])
            expect(other.get_by_role("button", name="Sentence 1.")).to_contain_text("fear")


def test_details_stay_under_the_pointer_and_the_focus(
    browser: Browser, control: RecordingControl
) -> None:
    """An utterance that ends meanwhile does not replace the details that are being corrected."""
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(utterance(1))
        fear = page.get_by_role("button", name="fear", exact=True)
        fear.hover()
        served.send(utterance(2))
        expect(page.locator(".utterance .words")).to_have_count(2)
        fear.click()
        expect(page.get_by_text("Saved: this was fear.")).to_be_visible()
        expect(fear).to_be_focused()
        page.mouse.move(0, 0)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_text("Saved: this was joy.")).to_be_visible()
        served.send(utterance(3))
        expect(page.locator(".utterance .words")).to_have_count(3)
        page.get_by_role("button", name="Sentence 3.").focus()
        expect(page.locator("blockquote")).to_have_text("Sentence 3.")
    assert [(one.id, one.label) for one in control.corrections] == [("d-1", "fear"), ("d-1", "joy")]


def test_labels_of_any_model_are_distinguishable(
    browser: Browser, control: RecordingControl
) -> None:
    """Each has its own letter and its own colour, whatever words a model has for emotions."""
    looks = """async (labels) => {
      const {setLabels, appearance} = await import("/emotions.js");
      setLabels(labels);
      return labels.map((label) => [appearance(label).letter, appearance(label).colour]);
    }"""
    iemocap = ["angry", "excited", "frustrated", "happy", "neutral", "sad"]
    with serve(control) as served, page_at(browser, served.address) as page:
        for labels in (INFO.labels, iemocap, ["mad", "joyful", "scared", "ärger", "ärgernis"]):
            letters, colours = zip(*page.evaluate(looks, labels), strict=True)
            assert len(set(letters)) == len(set(colours)) == len(labels)


def test_switches_and_requests_reach_control(browser: Browser, control: RecordingControl) -> None:
    """By the keyboard alone."""
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(Switch(source="ann", switch="listening", on=True))
        switch = page.get_by_role("switch", name="Listening")
        expect(switch).to_be_checked()
        switch.focus()
        page.keyboard.press("Enter")
        served.send(Switch(source="ann", switch="listening", on=False))
        expect(switch).not_to_be_checked()
        expect(switch).to_be_focused()
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_text("A new dialogue begins.")).to_be_visible()
    assert control.switched == [("ann", "listening", False)]
    assert "reset" in [request.command for request in control.requests]


def test_dialogue_is_erased_after_confirmation_only(
    browser: Browser, control: RecordingControl
) -> None:
    """Dismissing the question changes nothing."""
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(utterance(1), utterance(2))
        forget = page.get_by_role("button", name="Forget this dialogue")
        page.once("dialog", lambda dialog: dialog.dismiss())
        forget.click()
        page.once("dialog", lambda dialog: dialog.accept())
        forget.click()
        expect(page.get_by_text("Erased.")).to_be_visible()
        served.loop.run(served.dashboard.forget("d"))
        expect(page.get_by_text("No utterances yet")).to_be_visible()
        expect(forget).to_be_hidden()
    wishes = [one.arguments for one in control.requests if one.command == "forget"]
    assert wishes == [{"dialogue_id": "d"}]


def test_long_run_shows_its_newest_and_the_rest_on_request(
    browser: Browser, control: RecordingControl
) -> None:
    """The page draws a hundred utterances, and more when the button is pressed."""
    with serve(control) as served:
        served.send(*(utterance(turn) for turn in range(150)))
        with page_at(browser, served.address) as page:
            utterances = page.locator(".utterance .words")
            expect(utterances).to_have_count(100)
            expect(utterances.first).to_have_text("Sentence 149.")
            page.get_by_role("button", name="Show older ones").click()
            expect(utterances).to_have_count(150)
            expect(utterances.last).to_have_text("Sentence 0.")
            expect(page.get_by_role("list", name="Emotions")).to_contain_text("joy 150")


def test_dialogue_can_be_picked(browser: Browser, control: RecordingControl) -> None:
    """One of this run's, alone; choosing the run shows all again."""
    with serve(control) as served, page_at(browser, served.address) as page:
        served.send(utterance(1), utterance(1, dialogue="e", at_s=60, text="Elsewhere."))
        words = page.locator(".utterance .words")
        expect(words).to_have_text(["Elsewhere.", "Sentence 1."])
        page.get_by_label("Show").select_option("dialogue d")
        expect(words).to_have_text(["Sentence 1."])
        page.get_by_label("Show").select_option("")
        expect(words).to_have_count(2)


def test_recording_is_replayed_with_its_sound(
    browser: Browser, control: RecordingControl, tmp_path: Path
) -> None:
    """Playback marks the utterance that is heard, and an utterance can be played alone."""
    folder = record_session(
        tmp_path,
        JFK,
        utterances=[
            utterance(0, at_s=0.3, text="First."),
            utterance(1, "anger", at_s=8, text="Second."),
        ],
    )
    with serve(control, sessions=tmp_path) as served, page_at(browser, served.address) as page:
        page.get_by_label("Show").select_option(f"recording {folder.name}")
        expect(page.locator(".utterance .words")).to_have_text(["Second.", "First."])
        audio = page.locator("audio")
        expect(audio).to_have_js_property("duration", 11)
        audio.evaluate("audio => audio.play()")
        first = page.get_by_role("button", name="First.")
        expect(first).to_have_attribute("aria-pressed", "true")
        audio.evaluate("audio => audio.pause()")
        page.get_by_role("button", name="Second.").click()
        page.get_by_role("button", name="Play this").click()
        while audio.evaluate("audio => audio.currentTime") < 9:
            page.wait_for_timeout(50)
        expect(audio).to_have_js_property("paused", True)
        assert audio.evaluate("audio => audio.currentTime") < 10.5
        expect(page.locator(".pointer")).to_have_count(1)


def test_browser_microphone_is_a_source(browser: Browser, control: RecordingControl) -> None:
    """Chromium's own test tone comes out of the source as sound that is not silence."""
    with serve(control) as served:

        async def listen() -> float:
            loudest = 0.0
            async with source:
                async for chunk in source.chunks():
                    loudest = max(loudest, float(abs(chunk.samples.astype(int)).max(initial=0)))
                    if loudest > 1000:
                        return loudest
            return loudest

        async def lend() -> Any:
            return served.dashboard.microphone(
                SourceConfig(name="ann"), on_status=lambda state, line: None
            )

        source = served.loop.run(lend())
        with page_at(browser, served.address) as page:
            page.get_by_role("button", name="Use this browser's microphone").click()
            assert served.loop.run(listen()) > 1000
            page.get_by_role("button", name="Stop this browser's microphone").click()
            expect(page.get_by_role("button", name="Use this browser's microphone")).to_be_visible()


def test_page_finds_a_restarted_server(browser: Browser, control: RecordingControl) -> None:
    """It shows that it is disconnected, reconnects, and shows the new run."""
    with serve(control) as served:
        port = int(served.address.split(":")[2].rstrip("/"))
        context = browser.new_context()
        page = context.new_page()
        page.goto(served.address)
        served.send(utterance(1))
        expect(page.get_by_role("button", name="Sentence 1.")).to_be_visible()
    expect(page.get_by_text("○ Not connected")).to_be_visible()
    with serve(control, port=port) as served:
        served.send(utterance(2))
        expect(page.get_by_text("● Connected")).to_be_visible(timeout=15_000)
        expect(page.get_by_role("button", name="Sentence 2.")).to_be_visible()
        expect(page.get_by_role("button", name="Sentence 1.")).to_have_count(0)
        context.close()


def test_token_in_the_address_opens_the_page(browser: Browser, control: RecordingControl) -> None:
    """The token disappears from the address bar."""
    with (
        serve(control, token="geheim") as served,
        page_at(browser, served.address) as page,
    ):
        assert "geheim" in served.address
        assert "geheim" not in page.url


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_has_a_name(
    browser: Browser, control: RecordingControl, size: dict[str, int], scheme: str
) -> None:
    """Contrast is at least 4.5 to 1, controls have names, nothing overflows the screen."""
    with (
        serve(control) as served,
        page_at(browser, served.address, size=size, scheme=scheme) as page,
    ):
        served.send(Status(source="ann", stage="vad", state="degraded", detail="slow"))
        served.send(Switch(source="ann", switch="listening", on=True))
        served.send(*(utterance(turn, label) for turn, label in enumerate(INFO.labels)))
        served.send(utterance(9, conflict=True, degraded="acoustic: slow"))
        page.get_by_role("button", name="Sentence 0.").click()
        page.get_by_text("The timeline as a table").click()
        expect(page.get_by_role("group", name="What was it really?")).to_be_visible()
        assert nameless(page) == []
        faint = page.evaluate(FAINT_TEXT)
        assert faint == [], json.dumps(faint)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        expect(page.get_by_role("banner")).to_have_count(1)
        expect(page.get_by_role("main")).to_have_count(1)
        expect(page.get_by_role("contentinfo")).to_have_count(1)
        expect(page.get_by_role("complementary")).to_have_count(1)


def nameless(page: Page) -> list[str]:
    """Roles of controls and pictures without a name, in Chromium's own tree for screen readers."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    named = ("button", "combobox", "switch", "link", "textbox", "img", "table", "region")
    return [
        node["role"]["value"]
        for node in nodes
        if not node["ignored"]
        and node["role"]["value"] in named
        and not node.get("name", {}).get("value")
    ]


# Left and right edges of what is visible of each element inside its container, which clips it.
BOXES = """([each, container]) => {
  const clip = document.querySelector(container).getBoundingClientRect();
  return [...document.querySelectorAll(each)].map((element) => element.getBoundingClientRect())
    .map(({left, right}) => [Math.max(left, clip.left), Math.min(right, clip.right)])
    .filter(([left, right]) => left < right);
}"""

# The class of what a click on each lane's name would hit.
TOPMOST_AT_NAMES = """() => [...document.querySelectorAll(".lane")].map((name) => {
  name.scrollIntoView({block: "nearest"});
  const {left, right, top, bottom} = name.getBoundingClientRect();
  return document.elementFromPoint((left + right) / 2, (top + bottom) / 2).className;
})"""

# Whether more than 10,000 pixels of the level meter aren't empty.
PAINTED = """() => {
  const canvas = document.querySelector("canvas");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return pixels.filter((one, n) => n % 4 == 3 && one).length > 10_000;
}"""

# Each text against what is painted behind it, by WCAG 2's formula.
FAINT_TEXT = """() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const rect = e.tagName === "g" && e.querySelector("rect");
      if (rect && !element.matches(".conflict")) return parse(getComputedStyle(rect).fill);
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return parse(getComputedStyle(document.documentElement).backgroundColor);
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.matches("title, option, noscript")) continue;
    const style = getComputedStyle(element);
    const one = light(parse(element instanceof SVGElement ? style.fill : style.color));
    const other = light(behind(element));
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) faint.push([text, contrast]);
  }
  return faint;
}"""
