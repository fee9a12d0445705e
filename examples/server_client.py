"""A server with compression, and a question to it by OpenAI's client.

    python examples/server_client.py MODEL

MODEL: a folder or a hub name, e.g. .cache/models/smollm2 (scripts/setup.sh builds it).
"""

import subprocess
import sys
import time

from openai import APIConnectionError, OpenAI

PORT = 8017
STORY = "The grass was high, the sky was clear, and nobody came along the road that day. " * 60

command = ["vllm", "serve", sys.argv[1], "--served-model-name", "model", "--port", str(PORT)]
command += ["--kv-compress", "span", "--kv-compress-ratio", "0.75"]
# Leave these two out on a GPU, or where the whole machine is the server's.
command += ["--max-model-len", "4096", "--kv-cache-memory-bytes", "512M"]
# Starts sooner. Leave it out where speed counts.
command += ["--enforce-eager"]
server = subprocess.Popen(command)
try:
    client = OpenAI(base_url=f"http://localhost:{PORT}/v1", api_key="none")
    while True:
        try:
            client.models.list()
            break
        except APIConnectionError:
            if server.poll() is not None:
                sys.exit("the server has ended; its messages are above")
            time.sleep(1)
    content = f"{STORY}The number of the house is 48213. {STORY}\n\nWhat is the house's number?"
    reply = client.chat.completions.create(
        model="model",
        messages=[{"role": "user", "content": content}],
        max_tokens=32,
        temperature=0,
    )
    answer = reply.choices[0].message.content
    print(f"{reply.usage.prompt_tokens} prompt tokens, answer: {answer!r}")
finally:
    # It says what it kept on its way out.
    server.terminate()
    server.wait()
