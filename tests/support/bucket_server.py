"""Buckets on this machine, whose requests can be counted: gcp-storage-emulator and moto.

`serve_bucket` runs this file as a program, since the servers would share a test's threads.
"""

import contextlib
import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

NAME = "bucket"
_START_S = 60.0


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A bucket that is served.

    Attributes:
      url: of the bucket, such as gs://bucket.
      environment: variables by which clients find it.
      log: a line per request.
    """

    url: str
    environment: dict[str, str]
    log: pathlib.Path

    def requests(self) -> list[str]:
        """The requests so far, such as 'GET /b/bucket/o/name HTTP/1.1'."""
        return self.log.read_text(encoding="utf-8").splitlines()


@contextlib.contextmanager
def serve_bucket(scheme: str, folder: pathlib.Path) -> Iterator[Bucket]:
    """Serves a bucket, and sets the environment of this process for it meanwhile.

    Args:
      scheme: 'gs' or 's3'.
      folder: for the log.
    """
    from etils.epath import backend  # noqa: PLC0415 (only tests with buckets need it)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / f"{scheme}_requests.log"
    log.touch()
    command = [sys.executable, __file__, scheme, str(port), str(log)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    environment = _environment(scheme, f"http://127.0.0.1:{port}")
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        _wait_for(log.with_suffix(".ready"), server)
        backend.fsspec_backend._get_filesystem.cache_clear()
        yield Bucket(f"{scheme}://{NAME}", environment, log)
    finally:
        server.terminate()
        server.wait()
        backend.fsspec_backend._get_filesystem.cache_clear()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _environment(scheme: str, url: str) -> dict[str, str]:
    if scheme == "s3":
        return {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    return {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs and google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,  # Orbax's arrays
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # see conftest.py
        "FSSPEC_GS_TOKEN": "anon",
        "GOOGLE_CLOUD_PROJECT": "a",
        "NO_GCE_CHECK": "true",
    }


def _wait_for(path: pathlib.Path, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + _START_S
    while not path.exists():
        assert server.poll() is None, "the server of the bucket has ended"
        assert time.monotonic() < deadline, "the server of the bucket does not answer"
        time.sleep(0.05)


# ------------------------------------------------------------------------------
# The program.


def _serve_gs(port: int, log: pathlib.Path) -> None:
    from gcp_storage_emulator import server  # noqa: PLC0415
    from gcp_storage_emulator.handlers import objects  # noqa: PLC0415

    download = objects.download

    def download_with_generation(request, response, storage, *arguments, **options):
        """The emulator leaves out a header without which TensorStore cannot read a file again."""
        download(request, response, storage, *arguments, **options)
        if response.status < 400:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = found["generation"]

    objects.download = download_with_generation
    for _, methods in server.HANDLERS:
        if methods.get("GET") is download:
            methods["GET"] = download_with_generation
    server.RequestHandler.log_message = _logged_to(log)
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket=NAME).start()
    log.with_suffix(".ready").touch()


def _serve_s3(port: int, log: pathlib.Path) -> None:
    import boto3  # noqa: PLC0415
    from moto.moto_server import threaded_moto_server  # noqa: PLC0415

    threaded_moto_server.MotoRequestHandler.log_request = _logged_to(log)
    server = threaded_moto_server.ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    boto3.client("s3", **_S3_CLIENT, endpoint_url=f"http://127.0.0.1:{port}").create_bucket(
        Bucket=NAME
    )
    log.with_suffix(".ready").touch()
    while True:
        time.sleep(60)


_S3_CLIENT = {
    "region_name": "us-east-1",
    "aws_access_key_id": "a",
    "aws_secret_access_key": "b",
}


def _logged_to(path: pathlib.Path):
    """A method that logs a request, whatever the server passes about the answer."""
    file = path.open("a", encoding="utf-8", buffering=1)

    def log(handler, *answer) -> None:
        del answer
        file.write(handler.requestline + "\n")

    return log


if __name__ == "__main__":
    {"gs": _serve_gs, "s3": _serve_s3}[sys.argv[1]](int(sys.argv[2]), pathlib.Path(sys.argv[3]))
