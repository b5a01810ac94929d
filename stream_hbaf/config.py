"""Every knob there is, with its unit, its default and where its value may come from.

Precedence: defaults < file (YAML) < environment (``STREAM_HBAF_SECTION__KEY``) < command line
(``--set section.key=value``). Passwords come from the file or the environment only, because a
command line is visible to every process of the machine.
"""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator

from stream_hbaf.errors import ConfigError

SAMPLE_RATE_HZ = 16_000
ENVIRONMENT_PREFIX = "STREAM_HBAF_"
SECRETS = ("mqtt.password", "dashboard.token", "source.token")

TAKEN_NAMES = ("request", "response")  # topics that aren't a source's

Positive = Annotated[int, Field(gt=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Host = Annotated[str, Field(pattern=r"^[^\s:/]+$|^[0-9A-Fa-f:.]+$")]  # a name, IPv4 or IPv6
TopicPath = Annotated[str, Field(pattern=r"^[^+#\s\x00-\x1f\x7f]+$")]
TopicLevel = Annotated[str, Field(pattern=r"^[^/+#\s\x00-\x1f\x7f]+$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(Section):
    name: TopicLevel = "microphone"  # its topic level; "file" for a recording
    where: str = "mic"  # mic, mic:NAME, a file, a URL, ws://HOST:PORT, wyoming://HOST:PORT, browser
    speaker: str = ""  # who speaks; empty when unknown
    dialogue: str = ""  # sources with the same word talk with each other; empty: with nobody
    channel: Annotated[int, Field(ge=0)] | None = None  # of its sound; None: the mean of all
    token: SecretStr | None = None  # what whoever sends sound over a WebSocket must know
    chunk_ms: Positive = 64  # what a source gives at a time; never changes the answer

    @field_validator("name")
    @classmethod
    def _is_free(cls, name: str) -> str:
        if name in TAKEN_NAMES:
            raise ValueError(f"'{name}' is the beginning of other topics; choose another name")
        return name


class VadConfig(Section):
    engine: Literal["silero", "webrtc"] = "silero"
    threshold: Probability = 0.5  # a frame that scores this or more starts speech
    release: Probability = 0.35  # speech lasts until a frame scores less than this


class SegmenterConfig(Section):
    min_speech_ms: Positive = 160  # shorter sounds are not an utterance
    pause_ms: Positive = 160  # silence after which the words so far are decoded, at a venture
    min_silence_ms: Positive = 600  # silence that ends an utterance
    pre_roll_ms: Positive = 256  # sound kept from before the first speech frame
    post_roll_ms: Positive = 160  # sound kept from after the last speech frame; at most pause_ms
    max_utterance_s: Positive = 20  # the longest utterance
    soft_limit_s: Positive = 15  # from this length on any pause ends the utterance


class TranscriptConfig(Section):
    model: str = "base"  # a Whisper size, a CTranslate2 folder, or a hub name
    language: str = "en"
    partial_every_ms: Positive = 700  # of new speech between two running transcripts
    max_no_speech_prob: Probability = 0.6  # above it and unsure or looping: no words
    min_avg_logprob: float = -1.0
    min_speech_score: Probability = 0.4  # mean VAD score under which nothing is transcribed
    min_language_prob: Probability = 0.1  # of the language; below it another is spoken: no words


class DialogueConfig(Section):
    gap_s: Positive = 300  # a silence that ends a dialogue: the next utterance starts a new one


class MqttConfig(Section):
    url: str = "embedded"  # mqtt://host:port, mqtts://host:port, embedded, or none
    username: str | None = None
    password: SecretStr | None = None
    ca_file: Path | None = None  # certificate authority for mqtts://, else the system's
    certificate: Path | None = None  # this recogniser's own, for a broker that asks for one
    key: Path | None = None  # of that certificate, if it is in another file
    prefix: TopicPath = "stream_hbaf"
    node: TopicLevel | None = None  # this recogniser among others; the host name if not given
    port: Positive = 1883  # of the embedded broker
    version: Literal["3.1.1", "5"] = "3.1.1"  # of the protocol; the embedded broker knows 3.1.1
    outbox: Positive = 10_000  # finished messages held on disk while the broker is away
    outbox_age_h: Positive = 168  # and for how long
    homeassistant: TopicPath | None = None  # discovery prefix, usually homeassistant; None: without


class DashboardConfig(Section):
    host: Host = "127.0.0.1"  # elsewhere than on this machine, the page asks for the token
    port: Annotated[int, Field(ge=0, le=65535)] = 8770  # 0: any that is free
    token: SecretStr | None = None  # None: drawn at the start, and said


class Config(Section):
    """All settings of one recogniser. Immutable."""

    model: str = "live-en"  # a bundle's name or folder
    device: Literal["auto", "cpu", "cuda"] = "auto"
    inferences: bool = False  # say in phrases what commonsense infers from the words
    privacy: Literal["full", "no_text", "label_only"] = "full"  # what of it leaves the process
    record: Path | None = None  # folder that sessions are written to; None: nothing is recorded
    source: SourceConfig = SourceConfig()
    sources: tuple[SourceConfig, ...] = ()  # several at once, instead of the one
    vad: VadConfig = VadConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    transcript: TranscriptConfig = TranscriptConfig()
    dialogue: DialogueConfig = DialogueConfig()
    mqtt: MqttConfig = MqttConfig()
    dashboard: DashboardConfig | None = None  # None: no page

    @field_validator("sources")
    @classmethod
    def _have_names(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are called '{name}'; give each its own name")
        return sources


def load_config(
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Merge all sources of settings, or raise ConfigError naming the key and where it stood.

    ``environ`` is an environment such as ``os.environ``; ``overrides`` maps dotted keys
    (``mqtt.url``) to values, as ``--set`` and the other options of the command line give them.
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
            raise ConfigError(
                f"--set {key}: a password on the command line is visible to everybody on this "
                f"machine; set {_environment_name(key)} or put it in a --config file"
            )
        put(key, value, f"--set {key}")
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from None


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys, in their order of definition."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
        if sections and get_origin(field.annotation) is not tuple:
            keys += known_keys(sections[0], f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _environment_name(key: str) -> str:
    return ENVIRONMENT_PREFIX + key.upper().replace(".", "__")


def read_yaml(file: Path, *, example: str) -> dict[str, Any]:
    """The settings in a YAML file, none if it is empty; ConfigError with file and line.

    ``example`` is a line to show to whoever wrote something else.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: can't be read ({error.strerror}); check its name") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ConfigError(f"{where}: not valid YAML; correct that line") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: holds no settings; write lines such as '{example}'")
    return content


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Sections within sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _explain(error: ValidationError, origins: Mapping[str, str]) -> str:
    """The first complaint, as one line."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    related = (k for k in origins if f"{k}.".startswith(f"{key}.") or f"{key}.".startswith(f"{k}."))
    origin = origins.get(next(related, ""), "default")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
        meant = f"; did you mean '{near[0]}'?" if near else "; README lists the settings"
        return f"{origin}: unknown setting '{key}'{meant}"
    if first["type"] == "value_error":  # ours, which says all of it
        return f"{origin}: '{key}': {first['ctx']['error']}"
    value = "" if key in SECRETS else f", not {first['input']!r}"
    return f"{origin}: '{key}' {_expectation(first)}{value}"


def _expectation(first: Any) -> str:
    message = str(first["msg"])
    return "must be " + message.split("should be ", 1)[-1] if "should be" in message else message
