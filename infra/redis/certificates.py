"""Certificates for a server on this machine, signed by an authority that nobody else trusts. Made with openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from infra.redis.programs import find

# Extensions in full: from Python 3.13 on, clients refuse certificates that leave them out.
_CONFIGURATION = """
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:localhost, IP:127.0.0.1
"""
_KEY = "ecparam -name prime256v1 -genkey -noout -out"
_REQUEST = "req -new -config openssl.cnf"
_STEPS = (
    f"{_KEY} ca.key",
    f"{_KEY} server.key",
    f"{_REQUEST} -x509 -extensions authority -subj /CN=isochron-tests -key ca.key -days 365 -out ca.crt",
    f"{_REQUEST} -subj /CN=localhost -key server.key -out server.csr",
    "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -set_serial 1 -extfile openssl.cnf -extensions server "
    "-days 365 -out server.crt",
)


class CertificatesNotMade(Exception):
    """openssl ended with an error; the text is what it said."""


@dataclass(frozen=True)
class Certificates:
    """Files in PEM: the authority's certificate, which clients are given, and the server's own with its key."""

    authority: Path
    certificate: Path
    key: Path


def make_certificates(folder: Path) -> Certificates:
    """A new authority, and a certificate of it for localhost and 127.0.0.1, good for a year.

    The authority's key is deleted: nothing else can be signed with it. Raises ProgramMissing, CertificatesNotMade.
    """
    (folder / "openssl.cnf").write_text(_CONFIGURATION)
    for key in ("ca.key", "server.key"):
        (folder / key).touch(mode=0o600)
    for step in _STEPS:
        _openssl(folder, step)
    for used_up in ("ca.key", "server.csr", "openssl.cnf"):
        (folder / used_up).unlink()
    return Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key")


def _openssl(folder: Path, step: str) -> None:
    program = find("openssl")
    done = subprocess.run(
        [program.path, *step.split()], cwd=folder, env=program.environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CertificatesNotMade(f"openssl {step} in {folder} failed: {done.stderr.strip()}")
