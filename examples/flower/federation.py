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
from collections.abc import Iterator
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
        with contextlib.ExitStack() as stack:
            run(folder, asked.num_rounds, stack)
    except KeyboardInterrupt:
        sys.exit("\nstopped")


def run(folder: Path, num_rounds: int, stack: contextlib.ExitStack) -> None:
    """Start the parts one after the other, and the app on them."""
    secrets = folder / "secrets"
    make_certificates(secrets)
    address = f"127.0.0.1:{free_port()}"
    home = folder / "flwr"
    home.mkdir()
    certificate = secrets / "ca.pem"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "{address}"\n'
        f'root-certificates = "{certificate}"\n'
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}

    def start(name: str, *command: str) -> subprocess.Popen[bytes]:
        log = folder / f"{name}.log"
        return stack.enter_context(
            started(name, [tool(command[0]), *command[1:]], environment, log)
        )

    superlink = start(
        "superlink", "flower-superlink",
        "--host", "127.0.0.1", "--port", address.rpartition(":")[2],
        "--ssl-ca-certfile", str(certificate),
        "--ssl-certfile", str(secrets / "server.pem"), "--ssl-keyfile", str(secrets / "server.key"),
        "--enable-supernode-auth", "--disable-runtime-dependency-installation",
    )  # fmt: skip
    wait_for_port(address, superlink)
    for client in range(NUM_CLIENTS):
        make_node_key(secrets / f"node-{client}")
        flwr(environment, "supernode", "register", str(secrets / f"node-{client}.pub"), "loopback")
        state = folder / f"node-{client}"
        start(
            f"node-{client}", "flower-supernode",
            "--superlink", address, "--root-certificates", str(certificate),
            "--auth-supernode-private-key", str(secrets / f"node-{client}"),
            "--host", "127.0.0.1", "--port", str(free_port()),
            "--node-config", f'partition-id={client} state-dir="{state}"',
        )  # fmt: skip
    server = folder / "server"
    config = f'num-rounds={num_rounds} output-dir="{server}"'
    command = [tool("flwr"), "run", str(APP), "loopback", "--stream", "--run-config", config]
    subprocess.run(command, env=environment, check=True)
    show(server, num_rounds)


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
    with open(log, "wb") as output:
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


def flwr(environment: dict[str, str], *arguments: str) -> None:
    """A command of Flower, quiet unless it fails."""
    found = subprocess.run(
        [tool("flwr"), *arguments], env=environment, capture_output=True, text=True
    )
    if found.returncode:
        sys.exit(f"flwr {' '.join(arguments)} failed:\n{found.stdout}{found.stderr}")


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
