"""What the broker retains: the state of this run, and what ended runs have left there."""

from collections.abc import Iterable, Sequence

from stream_hbaf.config import MqttConfig
from stream_hbaf.events import Info
from stream_hbaf.publish.address import node_name
from stream_hbaf.publish.homeassistant import discovery, platforms
from stream_hbaf.publish.messages import Message, available, erasure, messages, retained_topics
from stream_hbaf.publish.outbox import Outbox
from stream_hbaf.publish.outbox_rows import Left

MOST_REMOVED = 200  # entities of which Home Assistant is told that they are gone: 30 sources


class RetainedState:
    """The retained messages of this run, to be published at every connection.

    Topics are noted in the outbox before they are published: whatever ends this run, the next one
    clears what it doesn't publish itself.
    """

    def __init__(self, config: MqttConfig, info: Info, outbox: Outbox) -> None:
        self.info = info
        self._config = config
        self._names = {"prefix": config.prefix, "node": node_name(config)}
        self._outbox = outbox
        self._held: dict[str, Message] = {}  # by topic: what the broker should hold
        self._speech: dict[str, Message] = {}  # by topic: the latest ON or OFF
        self._noted: dict[str, dict[str, str]] = {}  # by topic: entities, of a discovery message
        self._left: dict[str, Left] | None = None  # by topic; None: not known yet

    def describe(self, info: Info) -> list[Message]:
        """Take a new description; returns what clears the topics of sources that are gone."""
        before, self.info = self.info, info
        gone = [source for source in before.sources if source not in info.sources]
        if gone and self._config.homeassistant:
            message = discovery(before, self._config)
            left = self._find_left()
            entities = left.get(message.topic, Left(message.topic, {})).entities
            newest = [*(entities | platforms(message)).items()][-MOST_REMOVED:]
            left[message.topic] = Left(message.topic, dict(newest))
        topics = [topic for one in gone for topic in retained_topics(one, **self._names)]
        for source in gone:
            self._speech = {t: m for t, m in self._speech.items() if f"/{source}/" not in t}
        return [erasure(Message(topic, b"")) for topic in topics]

    def known(self) -> list[Message]:
        """The messages that there are at every connection: availability, info, discovery."""
        found = [available("online", **self._names), *messages(self.info, **self._names)]
        if self._config.homeassistant:
            message = discovery(self.info, self._config)
            gone = self._removed(message)
            found.append(discovery(self.info, self._config, removed=gone) if gone else message)
        return found

    def held(self) -> list[Message]:
        """The other messages that the broker should hold, erasures that are due, and whether
        there is speech, which the broker doesn't retain."""
        return [*self._held.values(), *self._speech.values()]

    def hold(self, found: Iterable[Message]) -> None:
        """Have retained messages published at the next connection, the latest of each topic."""
        self._held |= {message.topic: message for message in found if message.retain}

    def hold_speech(self, found: Iterable[Message]) -> None:
        """Have the latest message about speech published at the next connection."""
        self._speech |= {message.topic: message for message in found}

    def is_speech(self, message: Message) -> bool:
        """Whether ``held`` has a message about speech that supersedes this one."""
        return message.topic in self._speech

    def of_dialogue(self, dialogue_id: str) -> list[Message]:
        """The messages about a dialogue."""
        return [m for m in self._held.values() if m.dialogue_id == dialogue_id]

    async def note(self, found: Sequence[Message]) -> None:
        """Note on disk what is about to be published."""
        new = {m.topic: platforms(m) for m in found if m.retain and m.payload}
        new = {topic: entities for topic, entities in new.items() if topic not in self._noted}
        self._noted |= new
        await self._outbox.note_retained([Left(*item) for item in new.items()])

    async def published(self, found: Sequence[Message]) -> None:
        """Note that the broker holds messages, or has erased them."""
        cleared = [message.topic for message in found if message.retain and not message.payload]
        for topic in cleared:
            self._held.pop(topic, None)
            self._noted.pop(topic, None)
        left = self._find_left()
        await self._outbox.cleared([left.pop(topic, Left(topic, {})) for topic in cleared])
        for message in found:
            self._held |= {message.topic: message} if message.retain and message.payload else {}

    async def announced(self) -> None:
        """Note that the broker has taken discovery: removed entities are announced once."""
        for message in self.known():
            entities = platforms(discovery(self.info, self._config))
            if platforms(message) and self._noted.get(message.topic) != entities:
                self._noted[message.topic] = entities
                await self._outbox.note_retained([Left(message.topic, entities)])

    def erasures(self) -> list[Message]:
        """The messages that clear what ended runs left, except what this run publishes."""
        own = {message.topic for message in self.known()} | self._held.keys()
        return [
            erasure(Message(left.topic, b""))
            for left in self._find_left().values()
            if left.topic not in own and self._outbox.may_clear(left)
        ]

    def _find_left(self) -> dict[str, Left]:
        if self._left is None:
            self._left = {}
            for left in self._outbox.left:
                entities = self._left.get(left.topic, left).entities
                self._left[left.topic] = Left(left.topic, entities | left.entities, left.origin)
        return self._left

    def _removed(self, message: Message) -> dict[str, str]:
        """Entities that an ended run announced on the topic of this discovery message, and that
        are not in it."""
        left = self._find_left().get(message.topic)
        entities = left.entities if left else {}
        return {key: entities[key] for key in entities.keys() - platforms(message).keys()}
