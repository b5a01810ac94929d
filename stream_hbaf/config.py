"""Defines and loads all settings, each with its unit, default and description.

Precedence: defaults < file (YAML) < environment (``STREAM_HBAF_SECTION__KEY``) < command line
(``--set section.key=value``). Passwords come from the file or the environment only, because a
command line is visible to every process of the machine.

The string below a field is its description, which ``stream-hbaf settings`` and the settings page
of the documentation show.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from stream_hbaf.errors import ConfigError, shorten
from stream_hbaf.untrusted import (
    SETTINGS_BYTES,
    UntrustedError,
    as_unicode,
    parse_yaml,
    read_limited,
)

SAMPLE_RATE_HZ = 16_000
ENVIRONMENT_PREFIX = "STREAM_HBAF_"
SECRETS = ("mqtt.password", "dashboard.token", "metrics.token", "serve.token", "source.token")
PATHS = (
    "where",
    "model",
    "record",
    "ca_file",
    "certificate",
    "key",
    "checkpoints",
)  # may be other than UTF-8
RESERVED_NAMES = ("request", "response")  # first topic levels that belong to no source

# The types of settings, annotated with their limits and units. The upper limits are far beyond all
# use, and keep a wrong number from using up memory or time.
Positive = Annotated[int, Field(gt=0, le=1_000_000)]
Milliseconds = Annotated[int, Field(gt=0, le=3_600_000), "ms"]
ChunkMilliseconds = Annotated[int, Field(gt=0, le=10_000), "ms"]
Seconds = Annotated[int, Field(gt=0, le=86_400), "s"]
UtteranceSeconds = Annotated[int, Field(gt=0, le=600), "s"]
Hours = Annotated[int, Field(gt=0, le=87_600), "h"]
Probability = Annotated[float, Field(ge=0.0, le=1.0), "probability"]
LogProbability = Annotated[float, Field(ge=-100.0, le=100.0), "natural logarithm"]
Messages = Annotated[int, Field(gt=0, le=1_000_000), "messages"]
Port = Annotated[int, Field(ge=0, le=65535), "TCP port"]
Streams = Annotated[int, Field(gt=0, le=1000), "streams"]
Replicas = Annotated[int, Field(gt=0, le=1000), "replicas"]
Gpus = Annotated[float, Field(ge=0.0, le=64.0), "GPUs"]
Address = Annotated[str, Field(pattern=r"^(auto|local|\S+:\d+)$", max_length=300)]
Origin = Annotated[str, Field(pattern=r"^https?://[^/\s]+$", max_length=300)]
Speakers = Annotated[int, Field(gt=0, le=64), "speakers"]
Index = Annotated[int | None, Field(ge=0, le=1023), "index from 0"]
# A name, IPv4 or IPv6; parts of topics, which MQTT limits to 65,535 bytes.
Host = Annotated[str, Field(pattern=r"^[^\s:/]+$|^[0-9A-Fa-f:.]+$", max_length=255)]
TopicPath = Annotated[str, Field(pattern=r"^[^+#\s\x00-\x1f\x7f]+$", max_length=1000)]
TopicLevel = Annotated[str, Field(pattern=r"^[^/+#\s\x00-\x1f\x7f]+$", max_length=200)]


class Section(BaseModel):
    """A group of settings: immutable, and unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_text(cls, value: Any, about: ValidationInfo) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("holds a NUL character, which no name or path can; leave it out")
        if isinstance(value, str) and about.field_name not in PATHS and value != as_unicode(value):
            raise ValueError("isn't UTF-8; write it in UTF-8")
        return value


class SourceConfig(Section):
    """One audio source."""

    name: TopicLevel = "microphone"
    """Level of its MQTT topics; ``file`` for a recording unless it is set."""
    where: str = "mic"
    """``mic``, ``mic:NAME``, a file, ``-`` (standard input), a URL, ``ws://HOST:PORT``,
    ``wyoming://HOST:PORT``, ``satellite://HOST:PORT`` or ``browser``."""
    speaker: str = ""
    """Name of the only speaker at this source; empty if unknown, or if ``speakers.engine`` finds
    out."""
    dialogue: str = ""
    """Name of the dialogue: sources with the same one share it; empty for a dialogue of its own."""
    channel: Index = None
    """Channel of the audio to use; unset: the mean of all."""
    token: SecretStr | None = None
    """Password that senders to a WebSocket source must give."""
    chunk_ms: ChunkMilliseconds = 64
    """Length of the chunks that the source delivers; results do not depend on it."""

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name in RESERVED_NAMES:
            raise ValueError(f"'{name}' is the beginning of other topics; choose another name")
        return name


class VadConfig(Section):
    """Voice activity detection: a speech score for each frame."""

    engine: Literal["silero", "webrtc"] = "silero"
    """Silero's network, or WebRTC's detector, which is faster and mistakes noise for speech."""
    threshold: Probability = 0.5
    """Score from which a frame starts speech."""
    release: Probability = 0.35
    """Score below which a frame ends speech."""
    forget: bool = True
    """Forget each utterance 0.6 s after silence has ended it; then Silero finds quiet speech after
    loud speech, too."""


class SegmenterConfig(Section):
    """How speech scores become utterances."""

    min_speech_ms: Milliseconds = 160
    """Length below which a stretch of speech is no utterance."""
    pause_ms: Milliseconds = 160
    """Silence after which the utterance so far is transcribed, in case it has ended."""
    min_silence_ms: Milliseconds = 600
    """Silence that ends an utterance."""
    pre_roll_ms: Milliseconds = 256
    """Audio kept from before the first speech frame."""
    post_roll_ms: Milliseconds = 160
    """Audio kept from after the last speech frame, at most ``pause_ms``."""
    max_utterance_s: UtteranceSeconds = 20
    """Length at which an utterance is cut."""
    soft_limit_s: UtteranceSeconds = 15
    """Length from which any pause ends the utterance."""


class EndpointConfig(Section):
    """When a pause ends an utterance."""

    engine: Literal["silence", "pause", "turn", "auto"] = "silence"
    """``silence``: ``segmenter.min_silence_ms`` decides; ``pause``: how still the pause is, and how
    the source pauses, have a say; ``turn``: and a model of turns; ``auto``: ``turn`` where the
    model's weights are installed, else ``pause``."""
    silence_ms: Milliseconds = 352
    """Silence that ends an utterance if the pause is still and the source seldom goes on."""
    max_silence_ms: Milliseconds = 800
    """Silence that ends an utterance whose pause isn't still, or whose turn sounds unfinished."""
    still: Probability = 0.085
    """The highest speech score within a pause's last 256 ms up to which it is still; more where the
    source's pauses that last are mostly less still than that."""
    finished: Probability = 0.1
    """The model's probability from which a turn may end after ``silence_ms``, at a source that
    often goes on."""
    unfinished: Probability = 0.1
    """The model's probability below which a turn sounds unfinished, at such a source."""
    max_resumed: Probability = 0.5
    """Share of the source's pauses after which speech went on before ``segmenter.min_silence_ms``,
    up to which an utterance may end after ``silence_ms``; 1: always."""


class SpeakersConfig(Section):
    """Who speaks, found by the voice, at sources without ``source.speaker``."""

    engine: Literal["none", "campplus"] = "none"
    """``campplus``: the CAM++ speaker encoder; ``none``: speakers are not told apart."""
    max_speakers: Speakers = 8
    """Speakers of one dialogue; a further voice is not sure."""
    min_utterance_ms: Milliseconds = 1500
    """Length below which an utterance's speaker is not sure."""
    min_score: Probability = 0.5
    """Probability of the most probable speaker below which an utterance's is not sure."""
    min_enrolled_score: Probability = 0.9
    """Probability of a voice being an enrolled one's from which its speaker has that name."""
    enrolled_in_private: bool = False
    """Name enrolled voices also with another ``privacy`` than ``full``."""


class TranscriptConfig(Section):
    """Speech recognition."""

    model: str = "base"
    """Whisper model: a size, a folder in CTranslate2's format, or a name on the hub."""
    language: str = "en"
    """Code of the language that is transcribed."""
    partial_every_ms: Milliseconds = 700
    """New speech between two running transcripts."""
    max_no_speech_prob: Probability = 0.6
    """Whisper's no-speech probability above which an improbable or looping text is dropped."""
    min_avg_logprob: LogProbability = -1.0
    """Mean log probability of a text's tokens below which it counts as improbable."""
    min_speech_score: Probability = 0.4
    """Mean speech score of an utterance below which nothing is transcribed."""
    min_language_prob: Probability = 0.1
    """Probability of ``language`` below which an utterance is in another one and has no text."""


class DialogueConfig(Section):
    """Where a dialogue ends."""

    gap_s: Seconds = 300
    """Silence that ends a dialogue: the next utterance begins a new one."""
    keep_voices: bool = False
    """Go on measuring known speakers, enrolled or named by their source, against how they sounded
    in the source's dialogues before; kept in memory until ``reset``, ``forget`` or the end."""


class MqttConfig(Section):
    """The broker, and what is published there."""

    url: str = "embedded"
    """``mqtt://HOST:PORT``, ``mqtts://HOST:PORT``, ``embedded`` or ``none``."""
    username: str | None = None
    """User name at the broker."""
    password: SecretStr | None = None
    """Password at the broker."""
    ca_file: Path | None = None
    """File of the certificate authority for ``mqtts://``; unset: those of the system."""
    certificate: Path | None = None
    """File of the client's certificate, for a broker that asks for one."""
    key: Path | None = None
    """File of the client's private key, if it is not in the certificate's."""
    prefix: TopicPath = "stream_hbaf"
    """First level of all topics."""
    node: TopicLevel | None = None
    """Second level of all topics, one for each recogniser; unset: the host's name."""
    port: Annotated[Port, Field(gt=0)] = 1883
    """Port of the embedded broker."""
    version: Literal["3.1.1", "5"] = "3.1.1"
    """Version of the protocol; the embedded broker knows 3.1.1."""
    outbox: Messages = 10_000
    """Finished messages that are kept on disk, with their text, until the broker has them."""
    outbox_age_h: Hours = 168
    """Age at which a kept message is dropped."""
    homeassistant: TopicPath | None = None
    """Home Assistant's discovery prefix, usually ``homeassistant``; unset: no discovery."""


class DashboardConfig(Section):
    """The web page."""

    host: Host = "127.0.0.1"
    """Address to listen at; anywhere but on this machine the page asks for the token."""
    port: Port = 8770
    """Port to listen at; 0: any that is free."""
    token: SecretStr | None = None
    """Password of the page; unset: a random one, printed at the start."""


class MetricsConfig(Section):
    """The metrics for Prometheus."""

    host: Host = "127.0.0.1"
    """Address to listen at; anywhere but on this machine readers have to send the token."""
    port: Port = 8771
    """Port to listen at; 0: any that is free."""
    token: SecretStr | None = None
    """Bearer token of the readers; unset: a random one, printed at the start."""


class ServeConfig(Section):
    """The service for many streams, ``stream-hbaf serve``."""

    host: Host = "127.0.0.1"
    """Address to listen at; anywhere but on this machine a token must be set."""
    port: Port = 8772
    """Port to listen at; 0: any that is free."""
    token: SecretStr | None = None
    """Password that every client must give; unset: none, on this machine only."""
    certificate: Path | None = None
    """File of the certificate, with its chain, for ``wss://``; unset: no TLS."""
    key: Path | None = None
    """File of the certificate's private key, if it is not in the same file."""
    origins: tuple[Origin, ...] = ()
    """Origins of the web pages that may connect with the token, such as ``https://example.org``,
    beside pages of the same host."""
    max_streams: Streams | None = None
    """Streams at once, those that wait for their client included; unset: four for each core."""
    resume_s: Seconds = 120
    """How long a stream waits for its client after a lost connection."""
    checkpoints: Path | None = None
    """Folder in which streams and their dialogues are kept, so that a service that was killed goes
    on with them; unset: they end with it."""
    ray: Address | None = None
    """Ray cluster that runs the models, as ``HOST:PORT`` or ``auto``; unset: they run here."""
    replicas: Replicas = 4
    """Most replicas of each model on the cluster; there are as many as requests need."""
    gpus_each: Gpus = 0.0
    """GPUs that each replica takes, such as 0.5; 0: it runs on CPUs."""


class Config(Section):
    """All settings of one recogniser."""

    model: str = "live-en"
    """Name or folder of the bundle."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models run; ``auto``: on the GPU if there is one."""
    prior: Literal["auto"] | dict[str, Probability] | None = None
    """Shares of labels where it runs, such as ``{joy: 0.3}``, other labels having the rest as in
    training; ``auto``: estimated from the answers so far; unset: as in training."""
    adaptive_sets: bool = False
    """Move the threshold of the label sets at each correction (``feedback``), so that the sets hold
    the right label as often as the bundle states, on what is heard here."""
    inferences: bool = False
    """Publish phrases for what commonsense infers from an utterance."""
    privacy: Literal["full", "no_text", "label_only"] = "full"
    """What leaves the process: everything, no text, or labels alone."""
    record: Path | None = None
    """Folder in which sessions are recorded; unset: nothing is recorded."""
    source: SourceConfig = SourceConfig()
    """The audio source."""
    sources: tuple[SourceConfig, ...] = ()
    """Several audio sources at once, instead of ``source``; each has the settings of ``source``."""
    vad: VadConfig = VadConfig()
    """Voice activity detection."""
    segmenter: SegmenterConfig = SegmenterConfig()
    """How speech scores become utterances."""
    endpoint: EndpointConfig = EndpointConfig()
    """When a pause ends an utterance."""
    speakers: SpeakersConfig = SpeakersConfig()
    """Who speaks, found by the voice."""
    transcript: TranscriptConfig = TranscriptConfig()
    """Speech recognition."""
    dialogue: DialogueConfig = DialogueConfig()
    """Where a dialogue ends."""
    mqtt: MqttConfig = MqttConfig()
    """The broker, and what is published there."""
    dashboard: DashboardConfig | None = None
    """The web page; unset: no page."""
    metrics: MetricsConfig | None = None
    """The metrics for Prometheus; unset: no port for them."""
    serve: ServeConfig = ServeConfig()
    """The service for many streams."""
    traces: bool = False
    """Send a trace of each utterance to the OpenTelemetry collector that the environment variable
    ``OTEL_EXPORTER_OTLP_ENDPOINT`` names."""

    @field_validator("prior", mode="before")
    @classmethod
    def _are_shares(cls, prior: Any) -> Any:
        if prior is None or prior == "auto":
            return prior
        try:
            shares = {str(label): float(share) for label, share in prior.items()}
        except (AttributeError, TypeError, ValueError):
            raise ValueError("must be auto, or a share for labels, such as {joy: 0.3}") from None
        for label, share in shares.items():
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"the share of '{shorten(label)}' must be from 0 to 1")
        return shares

    @field_validator("sources")
    @classmethod
    def _have_names(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        for name, count in Counter(source.name for source in sources).items():
            if count > 1:
                raise ValueError(f"two sources are called '{name}'; give each its own name")
        return sources


def load_config(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Merge defaults, ``file``, ``environ`` and ``overrides``, the later ones winning.

    ``environ`` is an environment such as ``os.environ``; ``overrides`` maps dotted keys
    (``mqtt.url``) to values, as ``--set`` and the other options of the command line give them.
    Raises ConfigError naming the key and where it was set.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def put(key: str, value: Any, origin: str) -> None:
        *sections, leaf = key.split(".")
        node = merged
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{origin}: '{key}' is not a section")
        node[leaf] = node.get(leaf, {}) if value == {} else value
        origins[key] = origin

    if file is not None:
        for key, value in flatten(read_yaml(file, example="model: live-en")).items():
            put(key, value, str(file))
    for name, text in (environ or {}).items():
        if name.startswith(ENVIRONMENT_PREFIX):
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            put(key, text, f"environment variable {name}")
    for key, value in (overrides or {}).items():
        if key in SECRETS:
            variable = ENVIRONMENT_PREFIX + key.upper().replace(".", "__")
            raise ConfigError(
                f"--set {key}: a password on the command line is visible to everybody on this "
                f"machine; set {variable} or put it in a --config file"
            )
        put(key, value, f"--set {key}")
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from None


def iter_fields(
    model: type[BaseModel] = Config, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """The dotted key and the field of every setting, in their order of definition."""
    for name, field in model.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
        if sections and get_origin(field.annotation) is not tuple:
            yield from iter_fields(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name, field


def read_yaml(file: Path, *, example: str) -> dict[str, Any]:
    """The settings in a YAML file, {} if it is empty.

    ``example`` is a valid line, for the message if it holds something else. Raises ConfigError
    naming the file and, where it is known, the line.
    """
    try:
        content = parse_yaml(read_limited(file, limit=SETTINGS_BYTES))
    except OSError as error:
        name = shorten(str(file), limit=200)
        raise ConfigError(f"{name}: can't be read ({error.strerror}); check its name") from None
    except UntrustedError as error:
        where, what = (file, "file") if error.line is None else (f"{file}:{error.line}", "line")
        raise ConfigError(f"{where}: not valid YAML ({error}); correct that {what}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds no settings; write lines such as '{example}'")
    return content


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """The first error, as one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    related = (k for k in origins if f"{k}.".startswith(f"{key}.") or f"{key}.".startswith(f"{k}."))
    origin = origins.get(next(related, ""), "default")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, [key for key, _ in iter_fields()], n=1, cutoff=0.5)
        meant = f"; did you mean '{near[0]}'?" if near else "; stream-hbaf settings lists all"
        return f"{origin}: unknown setting '{shorten(key)}'{meant}"
    if first["type"] == "value_error":  # raised by a validator above, with a complete message
        return f"{origin}: '{key}': {first['ctx']['error']}"
    # A section or a list may hold a secret, and may be long.
    is_secret = key.rpartition(".")[2] in {secret.rpartition(".")[2] for secret in SECRETS}
    is_secret = is_secret or isinstance(first["input"], dict | list | tuple)
    value = "" if is_secret else f", not {shorten(repr(first['input']))}"
    message = re.sub(".*should be ", "must be ", first["msg"], count=1)
    return f"{origin}: '{key}' {message}{value}"
