"""What a broker does not take: messages that it refuses, and messages at which it hangs up.

An MQTT 5 broker states its largest packet, and answers that it refuses a message. With MQTT 3.1.1
it can only hang up, or take the message and drop it, which no publisher learns. So a message at
which the broker hangs up again and again, while it takes others and is there again at once, is
given up.
"""

import sys
from collections.abc import Callable, Sequence

from stream_hbaf.publish.connection import packet_size, publish
from stream_hbaf.publish.messages import Message
from stream_hbaf.publish.mqtt_client import (
    LARGEST_PACKET,
    NOT_AUTHORIZED,
    PACKET_TOO_LARGE,
    PAYLOAD_INVALID,
    TOPIC_INVALID,
    Client,
    RefusedError,
)
from stream_hbaf.publish.outbox_rows import Queued

ABOUT_MESSAGE = (NOT_AUTHORIZED, TOPIC_INVALID, PACKET_TOO_LARGE, PAYLOAD_INVALID)
HANG_UPS = 3  # at the same message, one after another: then it counts as their reason
IN_FLIGHT = 16  # messages sent before the first is acknowledged; mosquitto accepts 20
MAX_REPORTED = 1000  # topics whose refusal was reported; requests may name any number of them

CHECK_RULES = "check the broker's access rules"
RAISE_LIMIT = "raise the broker's limit (mosquitto: max_packet_size)"


class Refusals:
    """Publishes messages, and remembers which ones the broker does not take.

    It reports each topic once. What it learns from hang-ups holds until the broker was away.
    """

    def __init__(self, where: str, *, version: str, on_report: Callable[[str], None]) -> None:
        self.may_pass = False  # a refusal since this was set to False may pass by itself
        self._where = where
        self._version = version
        self._report = on_report
        self._reported: set[tuple[str, str]] = set()
        self._unconfirmed: list[Message] = []  # sent; the broker may not have read them yet
        # Hang-ups while a message was unconfirmed. Partials are never sent a second time: so they
        # are counted by topic, from the size that was the smallest.
        self._hang_ups: dict[Message, int] = {}
        self._droppable: dict[str, tuple[int, int]] = {}  # by topic: hang-ups and size
        self._largest = 0  # bytes of the largest packet that the broker has taken
        self._limit = LARGEST_PACKET + 1  # bytes from which it hangs up
        self._topics: set[str] = set()  # at which it hangs up

    async def publish(self, client: Client, message: Message) -> bool:
        """Publish a message; returns False if the broker does not take it, which is reported.

        Raises MqttError when the connection breaks.
        """
        if not self._may_send(client, message):
            return False
        self._unconfirmed.append(message)
        try:
            await publish(client, message, version=self._version)
        except RefusedError as error:
            self._confirm(message)
            self.may_pass |= error.passes
            self._report_refusal(message, error)
            return False
        if message.qos:  # else nothing tells whether the broker has read it
            self._confirm(message)
        return True

    def select(self, oldest: Sequence[Queued], client: Client) -> list[Queued]:
        """Those of the oldest messages that may be sent at once: one that may be the reason of a
        hang-up is sent alone."""
        selected: list[Queued] = []
        for queued in oldest[: min(IN_FLIGHT, client.limits.in_flight)]:
            if queued.aside:  # by an earlier run
                self._hang_ups.setdefault(queued.message, HANG_UPS - 1)
            if queued.message in self._hang_ups or self._may_be_too_large(queued.message):
                return selected or [queued]
            selected.append(queued)
        return selected

    def connection_lost(self, client: Client) -> bool:
        """Count a hang-up; returns whether a message is given up that counts as its reason."""
        unconfirmed, self._unconfirmed = self._unconfirmed, []
        if not client.hung_up or not unconfirmed:
            return False
        kept = [message for message in unconfirmed if not message.droppable]
        for message in kept:
            self._hang_ups[message] = self._hang_ups.get(message, 0) + 1
        if len(kept) == 1 and self._is_reason(kept[0], client) and self._give_up(kept[0]):
            self._droppable.clear()  # those were innocent
            return True
        # Beside another message a partial is the reason only if it is larger than all before.
        dropped = [m for m in unconfirmed if m.droppable]
        largest = max(dropped, key=self._size, default=None)
        if largest is None or (kept and self._size(largest) <= self._largest):
            return False
        count, size = self._droppable.get(largest.topic, (0, sys.maxsize))
        self._droppable[largest.topic] = count + 1, min(size, self._size(largest))
        return count + 1 >= HANG_UPS and self._give_up(largest)

    def broker_was_away(self) -> None:
        """Forget what was learnt from hang-ups: the broker may have other settings now, or it hung
        up because it ended."""
        self._hang_ups.clear()
        self._droppable.clear()
        self._topics.clear()
        self._largest, self._limit = 0, LARGEST_PACKET + 1

    def _size(self, message: Message) -> int:
        return packet_size(message, version=self._version)

    def _may_send(self, client: Client, message: Message) -> bool:
        size = self._size(message)
        largest = min(client.limits.packet_size, self._limit - 1)
        if size > largest:
            self._say(message, f"is too large ({size} bytes, of at most {largest})", RAISE_LIMIT)
            return False
        return message.topic not in self._topics

    def _confirm(self, message: Message) -> None:
        """The broker has read a message, and what was sent before it without acknowledgement."""
        if message not in self._unconfirmed:
            return  # of an earlier connection
        place = self._unconfirmed.index(message)
        read = [m for m in self._unconfirmed[:place] if not m.qos]
        self._unconfirmed = [m for m in self._unconfirmed if m not in read and m is not message]
        for each in (message, *read):
            size = self._size(each)
            self._largest = max(self._largest, size)
            self._hang_ups.pop(each, None)
            if size >= self._droppable.get(each.topic, (0, sys.maxsize))[1]:
                del self._droppable[each.topic]

    def _is_reason(self, message: Message, client: Client) -> bool:
        """Whether a message that was unconfirmed alone counts as the reason of the hang-ups."""
        said = client.ending is not None and client.ending.value in ABOUT_MESSAGE
        repeated = self._hang_ups[message] >= HANG_UPS
        return said or repeated or self._may_be_too_large(message)

    def _may_be_too_large(self, message: Message) -> bool:
        """Whether the broker hung up at a larger message, and has taken none as large."""
        return self._limit <= LARGEST_PACKET and self._size(message) > self._largest

    def _give_up(self, message: Message) -> bool:
        """Send no more messages of this size; or on its topic, if larger ones were taken."""
        size = self._size(message)
        if not self._largest:  # not even the first message, which is small
            self._say(message, "makes the broker hang up, as any", "check its settings and rules")
            return False
        self._hang_ups.pop(message, None)
        if size > self._largest:
            self._limit = min(self._limit, size)
            why = f"makes the broker hang up ({size} bytes; {self._largest} were taken)"
            self._say(message, why, RAISE_LIMIT)
        else:
            self._topics.add(message.topic)
            self._say(message, f"makes the broker hang up ({size} bytes)", CHECK_RULES)
        return True

    def _report_refusal(self, message: Message, error: RefusedError) -> None:
        if error.passes:
            self._say(message, f"is refused for now ({error})", "check the broker's quota")
        elif error.code == NOT_AUTHORIZED:
            self._say(message, f"may not be published ({error})", CHECK_RULES)
        elif error.code == PACKET_TOO_LARGE:
            self._say(message, f"is too large ({self._size(message)} bytes)", RAISE_LIMIT)
        else:
            self._say(message, f"is refused ({error})", "check the broker's settings")

    def _say(self, message: Message, why: str, advice: str) -> None:
        """Report one line, once for each topic and advice."""
        key = (message.topic, advice)
        if key in self._reported or len(self._reported) >= MAX_REPORTED:
            return
        self._reported.add(key)
        kept = "it stays in the outbox" if message.durable else "it is left out"
        self._report(f"{self._where}: a message on {message.topic} {why}; {kept}; {advice}")
