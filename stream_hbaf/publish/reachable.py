"""Whether a broker can be reached, by TCP and TLS, and why not, in one line."""

import asyncio
import socket
import ssl
import threading
from concurrent.futures import Future

from stream_hbaf.config import MqttConfig
from stream_hbaf.errors import BrokerError, ConfigError
from stream_hbaf.publish.address import Address

CONNECT_TIMEOUT_S = 5.0
NAME_MISMATCH, IP_MISMATCH = 62, 64  # OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH, ..._IP_...


async def check_reachable(address: Address, context: ssl.SSLContext | None) -> None:
    """Open and close a TCP (and TLS) connection. Raises BrokerError if that fails.

    The MQTT client connects in one of asyncio's threads, which the program waits for when it
    ends: a broker that doesn't answer would delay Ctrl-C. So a daemon thread connects first.
    """
    outcome: Future[None] = Future()
    outcome.set_running_or_notify_cancel()  # from here on the thread may settle it at any time

    def attempt() -> None:
        try:
            _connect(address, context)
        except (OSError, UnicodeError) as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=attempt, name="mqtt-reach", daemon=True).start()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await asyncio.wrap_future(outcome)
    except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
        raise BrokerError(f"{address}: {_explain(error, address)}") from None


def _connect(address: Address, context: ssl.SSLContext | None) -> None:
    with socket.create_connection((address.host, address.port), CONNECT_TIMEOUT_S) as plain:
        if context:
            try:
                context.wrap_socket(plain, server_hostname=address.host).close()
            except ConnectionError as error:  # the server did not understand the handshake
                raise ssl.SSLError(str(error)) from None


def tls_context(config: MqttConfig) -> ssl.SSLContext:
    """The certificates that the settings name. Raises ConfigError if they can't be read."""
    setting, file = "mqtt.ca_file", config.ca_file
    try:
        context = ssl.create_default_context(cafile=config.ca_file)
        if config.certificate is not None:
            setting, file = "mqtt.certificate", config.certificate
            # Without a password OpenSSL would ask for that of an encrypted key on the terminal.
            context.load_cert_chain(config.certificate, config.key, password="")
    except OSError as error:  # ssl.SSLError is one
        is_ssl = isinstance(error, ssl.SSLError)
        reason = "is not a PEM certificate" if is_ssl else error.strerror or "can't be read"
        if setting == "mqtt.certificate":
            reason += ", or mqtt.key is not its key"
        raise ConfigError(f"{setting}: {file}: {reason}; check the path") from None
    return context


def _explain(error: OSError | UnicodeError, address: Address) -> str:
    match error:
        case ssl.SSLCertVerificationError(verify_code=code) if code in (NAME_MISMATCH, IP_MISMATCH):
            return f"its certificate is not for '{address.host}'; use the name it was made for"
        case ssl.SSLCertVerificationError():
            return (
                f"its certificate is not trusted ({error.verify_message}); "
                "set mqtt.ca_file to the certificate of its authority"
            )
        case ssl.SSLError():
            return "does not speak TLS at this port; use mqtt:// or the broker's TLS port"
        case socket.gaierror() | UnicodeError():
            return f"no host '{address.host}' is known; check mqtt.url (--mqtt)"
        case ConnectionRefusedError():
            return "nothing listens there; start the broker, or check mqtt.url (--mqtt)"
        case TimeoutError():
            return f"no answer within {CONNECT_TIMEOUT_S:g} s; check mqtt.url and the firewall"
        case _:
            return f"{error.strerror or error}; check mqtt.url (--mqtt) and the network"
