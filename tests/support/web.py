# The web of an internet in tests: HTTPS at port 443 from DIR/HOST/PATH, with
# the certificate DIR/cert.pem and its key; and the packages it serves.
import base64, hashlib, http.server, io, json, os, ssl, sys, tarfile, zipfile

top = sys.argv[1]


def file(path, data):
    path = os.path.join(top, path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as out:
        out.write(data)


def wheel():
    files = {
        "demo.py": "print('from the registry')\n",
        "demo-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n",
        "demo-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for name, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
        lines.append(f"{name},sha256={digest.rstrip(b'=').decode()},{len(text)}")
    files["demo-1.0.dist-info/RECORD"] = "\n".join(lines + ["demo-1.0.dist-info/RECORD,,", ""])
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as out:
        for name, text in files.items():
            out.writestr(name, text)
    return packed.getvalue()


def tarball():
    packed = io.BytesIO()
    text = b'{"name": "demo", "version": "1.0.0"}\n'
    with tarfile.open(fileobj=packed, mode="w:gz") as out:
        entry = tarfile.TarInfo("package/package.json")
        entry.size = len(text)
        out.addfile(entry, io.BytesIO(text))
    return packed.getvalue()


name = "demo-1.0-py3-none-any.whl"
file("pypi.example.org/simple/demo/index.html", f'<a href="/files/{name}">{name}</a>'.encode())
file(f"pypi.example.org/files/{name}", wheel())
packed = tarball()
digest = "sha512-" + base64.b64encode(hashlib.sha512(packed).digest()).decode()
at = "https://registry.example.org/demo.tgz"
version = {"name": "demo", "version": "1.0.0", "dist": {"tarball": at, "integrity": digest}}
file("registry.example.org/demo", json.dumps({"name": "demo", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version}}).encode())
file("registry.example.org/demo.tgz", packed)


class Hosts(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path):
        host = self.headers["Host"].split(":")[0]
        parts = [part for part in path.split("?")[0].split("/") if part not in ("", ".", "..")]
        return os.path.join(top, host, *parts)

    def log_message(self, *_):
        pass


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(f"{top}/cert.pem", f"{top}/key.pem")
server = http.server.ThreadingHTTPServer(("0.0.0.0", 443), Hosts)
server.socket = context.wrap_socket(server.socket, server_side=True)
print("ready", flush=True)
server.serve_forever()
