"""Without asyncio: requests, a thread for each refund in flight, and cryptography."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter

from benchmarks import openssl, workload

from . import frame


def program(job: frame.Job) -> dict[str, float]:
    sign = openssl.signer(Path(job.keys, "merchant.pem"))
    verify = openssl.verifier(Path(job.keys, "gateway.pub.pem"))
    with requests.Session() as session, ThreadPoolExecutor(job.in_flight) as pool:
        adapter = HTTPAdapter(pool_maxsize=job.in_flight)
        session.mount("http://", adapter)
        session.mount("https://", adapter)

        def refund(number: int) -> None:
            fields = workload.request_fields(number)
            fields["sign"] = sign(workload.source(fields))
            response = session.post(job.url, data=json.dumps(fields), headers=workload.HEADERS)
            answer = response.json()
            if answer["ret_code"] != "0000" or not verify(workload.source(answer), answer["sign"]):
                raise RuntimeError(answer)

        list(pool.map(refund, range(job.warm_up)))
        began = frame.clocks()
        list(pool.map(refund, range(job.warm_up, job.warm_up + job.refunds)))
        return frame.timed(job.refunds, began)


if __name__ == "__main__":
    frame.main(program)
