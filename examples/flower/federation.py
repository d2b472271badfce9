"""A federation of real processes on this machine: one SuperLink and three SuperNodes, over TLS.

    python examples/flower/federation.py --output_dir outputs/flower

Makes certificates and keys, starts everything on loopback, registers the nodes' keys, runs the app
in this folder and shows its progress. All that it started is stopped at the end, also on Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

APP = Path(__file__).parent
NUM_CLIENTS = 3
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # this environment has it all
}


def main() -> None:
    """Run the federation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/flower"))
    parser.add_argument("--num_rounds", type=int, default=10)
    asked = parser.parse_args()
    folder = asked.output_dir.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stop what was started, too
    try:
        with Federation(folder) as federation:
            federation.superlink()
            for client in range(NUM_CLIENTS):
                federation.register(client)
                federation.node(client)
            server = folder / "server"
            federation.run(APP, **{"num-rounds": asked.num_rounds, "output-dir": str(server)})
    except KeyboardInterrupt:
        sys.exit("\nstopped")
    show(server, asked.num_rounds)


class Federation:
    """A SuperLink and its SuperNodes; when its block is left, all of them are stopped.

    Args:
        folder: for logs, certificates and keys, and the nodes' folders.
        variables: environment variables of all that is started, beside this process's own.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder, self.secrets = folder, folder / "secrets"
        self.address = f"127.0.0.1:{free_port()}"
        self._stack = contextlib.ExitStack()
        make_certificates(self.secrets)
        home = folder / "flwr"
        home.mkdir()
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\n'
            f'address = "{self.address}"\nroot-certificates = "{self.secrets / "ca.pem"}"\n'
        )
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {"FLWR_HOME": str(home), "PATH": path}
        self.environment = {**os.environ, **QUIET, **variables, **own}

    def __enter__(self) -> Federation:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for process in self.members():  # also those that outlived whoever started them
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def superlink(self, *options: str) -> subprocess.Popen[bytes]:
        """Start the SuperLink and wait until it listens."""
        process = self.start(
            "superlink", "flower-superlink",
            "--host", "127.0.0.1", "--port", self.address.rpartition(":")[2],
            "--ssl-ca-certfile", str(self.secrets / "ca.pem"),
            "--ssl-certfile", str(self.secrets / "server.pem"),
            "--ssl-keyfile", str(self.secrets / "server.key"),
            "--enable-supernode-auth", "--disable-runtime-dependency-installation", *options,
        )  # fmt: skip
        wait_for_port(self.address, process)
        return process

    def register(self, client: int) -> None:
        """Make a node's key and tell the SuperLink of it."""
        self.make_key(f"node-{client}")
        public = self.secrets / f"node-{client}.pub"
        self.flwr("supernode", "register", str(public), "loopback")

    def make_key(self, name: str) -> None:
        """Make a key that the SuperLink does not know yet."""
        make_node_key(self.secrets / name)

    def node(
        self, client: int, *, name: str = "", address: str = "", **config: str | int
    ) -> subprocess.Popen[bytes]:
        """Start a client's SuperNode, whose key and folder have its name."""
        name = name or f"node-{client}"
        facts = {"partition-id": client, "state-dir": str(self.folder / name), **config}
        return self.start(
            name, "flower-supernode",
            "--superlink", address or self.address,
            "--root-certificates", str(self.secrets / "ca.pem"),
            "--auth-supernode-private-key", str(self.secrets / name),
            "--host", "127.0.0.1", "--port", str(free_port()),
            "--node-config", in_toml(facts),
        )  # fmt: skip

    def start(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start one of Flower's programs; its output goes to ``name.log``."""
        log = self.folder / f"{name}.log"
        call = [tool(command), *arguments]
        return self._stack.enter_context(started(name, call, self.environment, log))

    def run(self, app: Path, /, **config: str | int) -> None:
        """Run an app and show its progress."""
        command = [tool("flwr"), *self.run_arguments(app, **config)]
        subprocess.run(command, env=self.environment, check=True)

    def run_arguments(self, app: Path, /, **config: str | int) -> list[str]:
        """What ``flwr`` is told to run an app to its end."""
        return ["run", str(app), "loopback", "--stream", "--run-config", in_toml(config)]

    def flwr(self, *arguments: str) -> str:
        """What a command of Flower prints."""
        found = subprocess.run(
            [tool("flwr"), *arguments], env=self.environment, capture_output=True, text=True
        )
        if found.returncode:
            sys.exit(f"flwr {' '.join(arguments)} failed:\n{found.stdout}{found.stderr}")
        return found.stdout

    def members(self) -> list[psutil.Process]:
        """All processes of this federation that are alive, whoever started them."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FLWR_HOME") == self.environment["FLWR_HOME"]:
                    found.append(process)
        return found


def show(server: Path, num_rounds: int) -> None:
    """What came out of it."""
    history = server / "history.json"
    rounds = json.loads(history.read_text()) if history.exists() else []
    if len(rounds) < num_rounds:
        sys.exit(
            f"only {len(rounds)} of {num_rounds} rounds were completed: see {server.parent}/*.log"
        )
    sent = sum(r["uplink_bytes"] + r["downlink_bytes"] for r in rounds)
    loss = rounds[-1]["train_loss"]
    print(f"{len(rounds)} rounds, {sent / 1e6:.2f} MB sent, training loss {loss:.3f}")
    print(f"global model: {server / 'model'}; history: {history}")


# Processes.


@contextlib.contextmanager
def started(
    name: str, command: list[str], environment: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is stopped at the end, with all that it started."""
    print(f"starting {name} (log: {log})", flush=True)
    with open(log, "ab") as output:  # a program that is started again adds to it
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, then end it and its descendants."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for member in family:  # clients' workers see that these are gone, and end, too
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def in_toml(facts: Mapping[str, str | int]) -> str:
    """Settings as Flower's commands take them."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in facts.items())


def tool(name: str) -> str:
    """A program that Flower installed beside this Python."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        sys.exit(f"{path} is missing: pip install 'fedpara-peft[flower,demo]'")
    return str(path)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(address: str, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    """Wait until somebody listens."""
    host, _, port = address.rpartition(":")
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return
        time.sleep(0.2)
    sys.exit(f"nobody listens on {address}: see superlink.log")


# Certificates and keys, for this run alone.


def make_certificates(folder: Path) -> None:
    """An authority's certificate, and with it one for a server on loopback."""
    folder.mkdir(mode=0o700)
    authority, server = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a federation's authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    ca = (
        certificate(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(usage(signs_certificates=True), critical=True)
        .sign(authority, hashes.SHA256())
    )
    own = (
        certificate(subject, issuer, server.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(authority, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(ca.public_bytes(pem))
    (folder / "server.pem").write_bytes(own.public_bytes(pem))
    write_private(folder / "server.key", server, serialization.PrivateFormat.TraditionalOpenSSL)


def certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    """A certificate valid for a day, to be signed."""
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
    )


def usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """What a key may be used for."""
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def make_node_key(path: Path) -> None:
    """A node's key pair, as OpenSSH writes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_private(path, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_suffix(".pub").write_bytes(public)


def write_private(
    path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat
) -> None:
    """A private key that only this user can read."""
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


if __name__ == "__main__":
    main()
