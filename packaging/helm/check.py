"""Called by scripts/check-charts."""
import pathlib
import re
import sys

import helm_python
import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CHART = ROOT / "packaging/helm/kata-deploy"
PLAIN = ROOT / "packaging/kata-deploy/kata-deploy.yaml"
IMAGE = {"image": {"repository": "registry.example/kata-deploy"}}
# All that values.yaml has, another way.
OTHER = {
    "image": {"repository": "r/k", "tag": "1", "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "secret"}],
    "nodeSelector": {"katana": "yes"},
    "tolerations": [{"operator": "Exists"}],
    "runtimeClass": {"create": True, "name": "vm", "memory": "200Mi"},
}
# The oldest that Chart.yaml allows, and the newest that is known.
VERSIONS = ["1.25", "1.37"]
HEAD = """\
# What the chart in packaging/helm/kata-deploy makes, for who has no Helm; made by `scripts/check-charts --write`. Put the name
# of your image in. To remove: `kubectl delete --namespace kube-system daemonset kata-deploy` and wait for its pods, then the rest.
"""
KINDS = {"DaemonSet", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "RuntimeClass", "Job"}


def render(values):
    with helm_python.Chart.load(str(CHART)) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name="kata-deploy", namespace="kube-system")
    return {name: text for name, text in files.items() if name.endswith(".yaml") and text.strip()}


def documents(files):
    return [document for text in files.values() for document in yaml.safe_load_all(text) if document]


def is_hook(text):
    return "helm.sh/hook" in text


def plain(files):
    texts = [text.strip() for _, text in sorted(files.items()) if not is_hook(text)]
    return HEAD + "---\n" + "\n---\n".join(texts) + "\n"


def problems():
    for name, values in [("usual values", IMAGE), ("other values", OTHER)]:
        result = helm_python.lint(str(CHART), values, strict=True)
        for message in result.get("messages") or []:
            if str(message.get("severity")).lower() not in ("0", "1", "info", "unknown"):
                yield f"{name}: {message}"
        found = documents(render(values))
        if {document["kind"] for document in found} != KINDS:
            yield f"{name}: the kinds are {sorted(document['kind'] for document in found)}"
        for document in found:
            for version in VERSIONS:
                try:
                    kubernetes_validate.validate(document, version, strict=True)
                except kubernetes_validate.ValidationError as error:
                    yield f"{name}: {document['kind']}: Kubernetes {version}: {error.message}"
    try:
        render({})
        yield "without an image, the values are accepted"
    except helm_python.HelmError:
        pass
    version = re.search(r'^version = "(.*)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)[1]
    if yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] != version:
        yield f"Chart.yaml: appVersion is not {version}"
    shipped = yaml.safe_load((ROOT / "config/runtimeclass.yaml").read_text())
    ours = next(document for document in documents(render(IMAGE)) if document["kind"] == "RuntimeClass")
    if (shipped["handler"], shipped["overhead"]) != (ours["handler"], ours["overhead"]):
        yield "config/runtimeclass.yaml has another handler or overhead"


def main():
    text = plain(render(IMAGE))
    if sys.argv[1:] == ["--write"]:
        PLAIN.write_text(text)
    found = list(problems())
    if PLAIN.read_text() != text:
        found.append(f"{PLAIN.relative_to(ROOT)} is not what the chart makes: scripts/check-charts --write")
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    print(f"chart, with Helm {helm_python.helm_sdk_version()}: {'not well' if found else 'well'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
