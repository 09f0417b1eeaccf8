"""A real S3 server on loopback, moto's, with a bucket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import boto3
import s3fs

_SECONDS = 240.0
BUCKET = "bucket"


class S3Server:
    """moto's server in a process of its own.

    Attributes:
        environment: what a process needs to know of it.
    """

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            # Not to look for a machine's own credentials.
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait(self) -> None:
        """Returns when it answers; makes the bucket."""
        deadline = time.monotonic() + _SECONDS
        url = f"{self.environment['AWS_ENDPOINT_URL']}/{BUCKET}"
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the S3 server ended"
            try:
                urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError("the S3 server did not start")

    def put(self, key: str, data: bytes) -> None:
        """An object that another process writes."""
        boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"]).put_object(
            Bucket=BUCKET, Key=key, Body=data
        )

    def stop(self) -> None:
        """Ends it."""
        self.process.terminate()
        self.process.wait()

    def __enter__(self) -> S3Server:
        self.wait()
        os.environ.update(self.environment)
        # fsspec goes on with the file system of a server before this one, which has ended.
        s3fs.S3FileSystem.clear_instance_cache()
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.environment:
            del os.environ[name]
        self.stop()
