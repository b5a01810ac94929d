"""Each event becomes exactly these bytes on exactly these topics."""

import json

import pytest
from mqtt_kit import END, JOY

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import ConfigError
from stream_hbaf.events import (
    Affect,
    DialogueSummary,
    Health,
    Inferred,
    Info,
    Level,
    Model,
    Partial,
    Quantiles,
    Response,
    Speech,
    Status,
    Switch,
    Utterance,
)
from stream_hbaf.publish.address import Address, node_name, read_address
from stream_hbaf.publish.connection import backoff
from stream_hbaf.publish.messages import Message, available, encode, messages


def test_utterance_end_is_these_bytes() -> None:
    """An `end` is compact JSON, UTF-8 unescaped, `schema` first, numbers rounded; QoS 1."""
    payload = (
        '{"schema":"stream_hbaf/utterance/1","id":"u1","rev":3,"type":"end",'
        '"source":"microphone","dialogue_id":"d1","turn":2,"speaker":"Zoë",'
        '"speaker_score":0.9123,"speaker_source":"enrolled",'
        '"start_time":"2026-01-02T03:04:05.600Z","end_time":"2026-01-02T03:04:07.100Z",'
        '"audio_start_ms":1000.0,"audio_end_ms":2500.1,"trigger":"silence",'
        '"text":"I got the “job” 🎉","language":"en",'
        '"asr":{"avg_logprob":-0.1235,"no_speech_prob":0.01},"modalities":["audio","text"],'
        '"emotion":{"label":"joy","score":0.82,"abstained":false,"set":["joy"],'
        '"probabilities":{"joy":0.82,"neutral":0.18}},'
        '"contributions":{"audio":0.5,"text":-0.1,"context":0.0},"conflict":true,'
        '"degraded":"","latency_ms":{"vad":600.0,"transcript":1.3,"acoustic":2.0,"text":5.0,'
        '"classify":3.0,"publish":0.1,"total":611.4},'
        f'"model":{{"id":"live-en","sha256":"{"ab" * 32}"}}}}'
    )
    assert messages(END, prefix="p", node="n") == [
        Message(
            "p/n/microphone/utterance",
            payload.encode(),
            qos=1,
            dialogue_id="d1",
            properties=(
                ("schema", "stream_hbaf/utterance/1"),
                ("source", "microphone"),
                ("speaker", "Zoë"),
            ),
        ),
        Message(
            "p/n/microphone/emotion",
            b"joy",
            qos=1,
            retain=True,
            dialogue_id="d1",
            properties=(("source", "microphone"),),
        ),
    ]


def test_utterance_new_leaves_out_what_is_not_known_yet() -> None:
    """A `new` has no field that is null."""
    new = Utterance(
        id="u1",
        rev=1,
        type="new",
        source="m",
        dialogue_id="d1",
        turn=1,
        speaker="",
        start_time="t",
        audio_start_ms=0.0,
    )
    (message,) = messages(new, prefix="p", node="n")
    assert message.payload == (
        b'{"schema":"stream_hbaf/utterance/1","id":"u1","rev":1,"type":"new","source":"m",'
        b'"dialogue_id":"d1","turn":1,"speaker":"","speaker_source":"","start_time":"t","audio_start_ms":0.0,'
        b'"text":"","language":"","modalities":[],"degraded":""}'
    )


def test_inferences_follow_the_conflict() -> None:
    """Phrases are published in their order; without inferences the field is absent."""
    inferred = Inferred(external=["fâché", "happy"], internal=["glad"], purpose=[])
    event = END.model_copy(update={"inferences": inferred})
    inside = (
        '"conflict":true,'
        '"inferences":{"external":["fâché","happy"],"internal":["glad"],"purpose":[]},'
        '"degraded":""'
    )
    without = '"conflict":true,"degraded":""'
    assert without.encode() in encode(END)
    assert encode(event) == encode(END).replace(without.encode(), inside.encode())
    assert Utterance.model_validate(json.loads(encode(event))).inferences == inferred


@pytest.mark.parametrize(
    ("event", "last_label", "count"),
    [
        (END, "anger", 2),
        (END, "joy", 1),
        (END.model_copy(update={"type": "update"}), "anger", 1),
        (END.model_copy(update={"emotion": None}), "anger", 1),
    ],
)
def test_emotion_is_sent_on_change(event: Utterance, last_label: str, count: int) -> None:
    """The emotion topic carries final labels, and only those that differ from the last."""
    assert len(messages(event, prefix="p", node="n", last_label=last_label)) == count


def test_partial_is_droppable() -> None:
    """A running transcript has QoS 0 and may be dropped."""
    partial = Partial(
        id="u1",
        source="m",
        dialogue_id="d1",
        speaker="",
        text="I got",
        modalities=["text"],
        emotion=JOY,
    )
    assert messages(partial, prefix="p", node="n") == [
        Message(
            "p/n/m/partial",
            b'{"schema":"stream_hbaf/partial/1","id":"u1","source":"m","dialogue_id":"d1",'
            b'"speaker":"","text":"I got","modalities":["text"],"emotion":{"label":"joy",'
            b'"score":0.82,"abstained":false,"set":["joy"],"probabilities":{"joy":0.82,"neutral":0.18}}}',
            qos=0,
            retain=False,
            droppable=True,
            dialogue_id="d1",
            expires_s=10,
            properties=(("schema", "stream_hbaf/partial/1"), ("source", "m")),
        )
    ]


def test_states_are_retained() -> None:
    """`info`, `status` and `available` are there for whoever subscribes later."""
    info = Info(
        version="0.1.0",
        model=Model(id="b", sha256="c"),
        labels=["anger", "joy"],
        licence="MIT",
        sources=["m"],
    )
    status = Status(source="m", stage="capture", state="degraded", detail="not published")
    assert messages(info, prefix="p", node="n") == [
        Message(
            "p/n/info",
            b'{"schema":"stream_hbaf/info/1","version":"0.1.0","model":{"id":"b","sha256":"c"},'
            b'"labels":["anger","joy"],"licence":"MIT","sources":["m"],"privacy":"full",'
            b'"speakers":[]}',
            retain=True,
            properties=(("schema", "stream_hbaf/info/1"),),
        )
    ]
    assert messages(status, prefix="p", node="n") == [
        Message(
            "p/n/m/status/capture",
            b"degraded",
            qos=1,
            retain=True,
            properties=(("source", "m"),),
        )
    ]
    assert available("offline", prefix="p", node="n") == Message(
        "p/n/available", b"offline", qos=1, retain=True
    )


def test_health_and_dialogue_are_retained() -> None:
    """Durations inside `latency_ms` are rounded to 0.1 ms, at any depth."""
    health = Health(
        uptime_s=60.00004,
        memory_mb=512.5,
        utterances=3,
        queues={"outbox": 0},
        dropped={"partials": 2},
        latency_ms={"total": Quantiles(p50=611.449, p95=700.0)},
    )
    summary = DialogueSummary(
        source="m",
        dialogue_id="d1",
        start_time="t1",
        end_time="t2",
        turns=2,
        speakers={"Zoë": "joy"},
        emotions={"joy": 2},
        probabilities={"joy": 0.123456},
        mood={"Zoë": Affect(valence=0.761111, arousal=0.48)},
        shift=True,
    )
    assert messages(health, prefix="p", node="n") == [
        Message(
            "p/n/health",
            b'{"schema":"stream_hbaf/health/1","uptime_s":60.0,"memory_mb":512.5,"utterances":3,'
            b'"queues":{"outbox":0},"dropped":{"partials":2},'
            b'"latency_ms":{"total":{"p50":611.4,"p95":700.0}},"hints":[]}',
            retain=True,
            properties=(("schema", "stream_hbaf/health/1"),),
        )
    ]
    assert messages(summary, prefix="p", node="n") == [
        Message(
            "p/n/m/dialogue",
            '{"schema":"stream_hbaf/dialogue/1","source":"m","dialogue_id":"d1","start_time":"t1",'
            '"end_time":"t2","turns":2,"speakers":{"Zoë":"joy"},"emotions":{"joy":2},'
            '"probabilities":{"joy":0.1235},'
            '"mood":{"Zoë":{"valence":0.7611,"arousal":0.48,"source":"derived"}},"shift":true}'.encode(),
            retain=True,
            dialogue_id="d1",
            properties=(("schema", "stream_hbaf/dialogue/1"), ("source", "m")),
        )
    ]


def test_switch_is_retained() -> None:
    """Its state is a bare word on a topic of its own."""
    switch = Switch(source="m", switch="record", on=True)
    assert messages(switch, prefix="p", node="n") == [
        Message("p/n/m/record/state", b"ON", retain=True, properties=(("source", "m"),))
    ]


def test_answer_expires() -> None:
    """It has the command's topic, is not retained, and means nothing after a minute."""
    answer = Response(command="ping", status="ok", content={"time": 1.5}, transaction="t")
    assert messages(answer, prefix="p", node="n") == [
        Message(
            "p/n/response/ping",
            b'{"schema":"stream_hbaf/response/1","command":"ping","status":"ok",'
            b'"data":{"time":1.5},"error":"","transaction":"t"}',
            expires_s=60,
            properties=(("schema", "stream_hbaf/response/1"),),
        )
    ]


@pytest.mark.parametrize("event", [END, END.model_copy(update={"type": "new", "emotion": None})])
def test_utterances_are_durable(event: Utterance) -> None:
    """Their messages survive a kill; the label, which is state, needs not."""
    durable = [message.durable for message in messages(event, prefix="p", node="n")]
    assert durable == [True, False][: len(durable)]


def test_speech_is_on_or_off() -> None:
    """Speech is a bare word, not retained; the level is for the screen only."""
    on, off = Speech(source="m", on=True), Speech(source="m", on=False)
    assert messages(on, prefix="p", node="n")[0].payload == b"ON"
    assert messages(off, prefix="p", node="n") == [
        Message(
            "p/n/m/speech",
            b"OFF",
            qos=0,
            droppable=True,
            expires_s=10,
            properties=(("source", "m"),),
        )
    ]
    assert messages(Level(source="m", dbfs=-30.0, speech=True), prefix="p", node="n") == []


def test_payload_round_trip() -> None:
    """A payload reads back as the event it was, at the rounding's precision."""
    back = Utterance.model_validate(json.loads(encode(END)))
    assert encode(back) == encode(END)
    assert back.text == END.text


def test_not_a_number_is_refused() -> None:
    """NaN is no JSON: it must not go out as something no receiver can read."""
    with pytest.raises(ValueError, match="JSON"):
        encode(END.model_copy(update={"audio_start_ms": float("nan")}))


@pytest.mark.parametrize(
    ("url", "address", "shown"),
    [
        ("mqtt://broker", Address("broker", 1883), "mqtt://broker:1883"),
        ("mqtts://broker", Address("broker", 8883, tls=True), "mqtts://broker:8883"),
        ("mqtt://[::1]:1999", Address("::1", 1999), "mqtt://[::1]:1999"),
        ("ws://broker", Address("broker", 80, path="/mqtt"), "ws://broker:80/mqtt"),
        (
            "wss://broker:9001/a/b",
            Address("broker", 9001, tls=True, path="/a/b"),
            "wss://broker:9001/a/b",
        ),
        ("mqtt://eve@broker/", Address("broker", 1883, username="eve"), "mqtt://broker:1883"),
        (
            "mqtt://ann%40example.org@broker",
            Address("broker", 1883, username="ann@example.org"),
            "mqtt://broker:1883",
        ),
        (
            "ws://zo%C3%AB%3A1@[fe80::1%25eth0]:9001/a b",
            Address("fe80::1%eth0", 9001, username="zoë:1", path="/a%20b"),
            "ws://[fe80::1%25eth0]:9001/a%20b",
        ),
        ("embedded", Address("127.0.0.1", 1883), "mqtt://127.0.0.1:1883"),
    ],
)
def test_url_forms(url: str, address: Address, shown: str) -> None:
    """Each form of mqtt.url leads to one address, shown without the user."""
    assert read_address(MqttConfig(url=url)) == address
    assert str(read_address(MqttConfig(url=url))) == shown


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("mqtt://eve:s3cret@broker", "STREAM_HBAF_MQTT__PASSWORD"),
        ("eve:s3cret@broker", "mqtt://HOST:PORT"),
        ("ws://broker/mqtt?x=1", "has a path"),
        ("broker:1883", "mqtt://HOST:PORT"),
        ("broker", "mqtt://HOST:PORT"),
        ("mqtt://broker:port", "malformed"),
        ("mqtt://broker:99999", "malformed"),
        ("mqtt://::1:1883", r"brackets: mqtt://\[::1\]"),
        ("mqtt://%FF@broker", "set mqtt.username"),
        ("mqtt://a%00b@broker", "set mqtt.username"),
        ("mqtt://", "mqtt://HOST:PORT"),
        ("mqtt://broker/topic", "has a path"),
        ("none", "there is no broker"),
    ],
)
def test_url_refused(url: str, complaint: str) -> None:
    """A url that can't be used ends in one line that says what to write, without the password."""
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_address(MqttConfig(url=url))
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_node_name_is_topic_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a configured node, the host's name in letters that any topic may hold."""
    monkeypatch.setattr("socket.gethostname", lambda: "Zoë's laptop.local/#+")
    assert node_name(MqttConfig()) == "Zo_s_laptop_local"
    assert node_name(MqttConfig(node="kitchen")) == "kitchen"


def test_backoff_doubles_to_half_a_minute() -> None:
    """Attempts are 0.5 s apart at first, 30 s in the end, and never in step with others'."""
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30]
    delays = [delay for delay, _ in zip(backoff(), longest, strict=False)]
    assert all(top / 2 <= delay <= top for delay, top in zip(delays, longest, strict=True))
