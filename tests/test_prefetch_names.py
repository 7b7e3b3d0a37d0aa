"""
Names of images, the choice of platforms, and where names are found.
"""

from __future__ import annotations

import json
from textwrap import dedent
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from ecrproxy.command.prefetching.documents import images_in
from ecrproxy.command.prefetching.images import ForeignImageError, listed_images, parse_image, target
from ecrproxy.oci import Digest
from ecrproxy.platforms import Platform, choose, offers
from ecrproxy.registries import Registries
from tests.test_registries import COMPANY, ONE, TWO, parsed

ECR = "123456789012.dkr.ecr.eu-west-1.amazonaws.com"
HOSTS = frozenset({ECR, "proxy.example:5000"})
DIGEST = str(Digest.of(b"x"))


def path(text: str) -> str:
    """
    Return the path for a name.
    """
    return parse_image(text, HOSTS).route.path


class ImageTests(SynchronousTestCase):
    """
    Names of images.
    """

    def test_a_name_is_read_as_docker_reads_it(self) -> None:
        """
        Host, repository, tag and digest are where docker has them; a digest wins, and latest is the default.
        """
        self.assertEqual("/v2/team/app/manifests/1.2", path("team/app:1.2"))
        self.assertEqual("/v2/app/manifests/latest", path("app"))
        self.assertEqual("/v2/app/manifests/5000", path("app:5000"))
        self.assertEqual(f"/v2/team/app/manifests/{DIGEST}", path(f"team/app@{DIGEST}"))
        self.assertEqual(f"/v2/team/app/manifests/{DIGEST}", path(f"{ECR}/team/app:1@{DIGEST}"))
        self.assertEqual("/v2/team/app/manifests/1", path(f"{ECR.upper()}/team/app:1"))
        self.assertEqual("/v2/app/manifests/latest", path("proxy.example:5000/app"))

    def test_another_registrys_image_is_told_from_ours(self) -> None:
        """
        A name with another host is skipped here; in a manifest, a name without a host is Docker Hub's.
        """
        for text in ("docker.io/library/nginx", "localhost/x", "proxy.example/app", "registry:5000/x", f"{TWO}/x"):
            with self.assertRaises(ForeignImageError):
                path(text)
        with self.assertRaises(ForeignImageError):
            parse_image("nginx:1", HOSTS, bare=False)

    def test_of_a_manifest_with_six_registries_those_that_are_ours_are_known(self) -> None:
        """
        With the requests to the daemon for each.
        """
        registries = Registries(parsed(COMPANY)[0])
        dual = TWO.replace(".dkr.ecr.", ".dkr-ecr.").replace("amazonaws.com", "on.aws")
        text = "\n---\n".join(
            f"kind: Pod\nspec: {{containers: [{{image: '{each}'}}]}}"
            for each in (
                f"{ONE}/team/app:1",
                f"{ONE}/us/app:1",
                f"{dual}/team/app:1",
                "222200001111.dkr.ecr.eu-central-1.amazonaws.com/a",
                f"public.ecr.aws/nginx/nginx@{DIGEST}",
                "nginx:1",
                "quay.io/x/y",
                "proxy.example:5000/us/team/app",
                "us.registry.example:5000/team/app",
                "ghcr.io/x/y",
            )
        )
        *ours, theirs = images_in(text, {})
        self.assertEqual(
            [
                "/v2/team/app/manifests/1",
                f"/v2/us/app/manifests/1?ns={ONE}",
                f"/v2/team/app/manifests/1?ns={TWO}",
                "/v2/a/manifests/latest?ns=222200001111.dkr.ecr.eu-central-1.amazonaws.com",
                f"/v2/nginx/nginx/manifests/{DIGEST}?ns=public.ecr.aws",
                "/v2/library/nginx/manifests/1?ns=docker.io",
                "/v2/x/y/manifests/latest?ns=quay.io",
                f"/v2/team/app/manifests/latest?ns={TWO}",
                f"/v2/team/app/manifests/latest?ns={TWO}",
            ],
            [target(parse_image(each, HOSTS, registries, bare=False).route) for each in ours],
        )
        with self.assertRaises(ForeignImageError):
            parse_image(theirs, HOSTS, registries, bare=False)

    def test_what_is_no_name_is_refused(self) -> None:
        """
        Names that the registry would reject are rejected before a request.
        """
        for text in ("", "App", "app:", "app@latest", "app@sha256:12", "a//b", "app:a b", "../x"):
            with self.assertRaises(ValueError, msg=text):
                path(text)

    def test_a_list_has_a_name_a_line(self) -> None:
        """
        Blank lines and comments are ignored.
        """
        self.assertEqual(["a:1", "b"], list(listed_images("# all\n\n a:1  # one\nb\n#c\n")))


def index(*platforms: dict[str, str] | None) -> bytes:
    """
    Return an index; the digest of each of its manifests is made of its number.
    """
    entries: list[dict[str, Any]] = [
        {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": str(Digest.of(str(number).encode())),
            "size": 2,
            **({"platform": each} if each is not None else {}),
        }
        for number, each in enumerate(platforms)
    ]
    return json.dumps({"manifests": entries}).encode()


def system(architecture: str, variant: str = "", name: str = "linux") -> dict[str, str]:
    """
    Return a platform as in an index.
    """
    return {"os": name, "architecture": architecture, **({"variant": variant} if variant else {})}


def chosen(document: bytes, *platforms: str) -> list[int]:
    """
    Return the numbers of the chosen manifests.
    """
    numbers = {Digest.of(str(number).encode()): number for number in range(10)}
    wanted = [Platform.parse(text) for text in platforms]
    return [numbers[each.digest] for each in choose(list(offers(document)), wanted)]


class PlatformTests(SynchronousTestCase):
    """
    What an index has for a platform.
    """

    def test_the_default_is_linux_on_this_machine(self) -> None:
        """
        The kernel's machine names are mapped to those of images.
        """
        machines = ["x86_64", "aarch64", "armv7l", "ppc64le", "riscv64"]
        wanted = ["linux/amd64", "linux/arm64", "linux/arm/v7", "linux/ppc64le", "linux/riscv64"]
        self.assertEqual(wanted, [str(Platform.of_machine(each)) for each in machines])

    def test_what_is_no_platform_is_refused(self) -> None:
        """
        At least an operating system and an architecture are required.
        """
        for text in ("linux", "", "linux/", "linux/arm/v7/x", "linux arm"):
            with self.assertRaises(ValueError, msg=text):
                Platform.parse(text)

    def test_the_platform_is_taken_and_no_other(self) -> None:
        """
        Other systems, and entries without a platform, such as attestations, are skipped.
        """
        document = index(system("amd64", name="windows"), system("unknown", name="unknown"), None, system("amd64"))
        self.assertEqual([3], chosen(document, "linux/amd64"))
        self.assertEqual([3, 0], chosen(document, "linux/x86_64", "windows/amd64"))

    def test_the_highest_variant_that_runs_is_taken(self) -> None:
        """
        A machine runs lower variants too, but none that is higher; no variant means the usual one.
        """
        arms = index(system("arm", "v5"), system("arm", "v7"), system("arm", "v6"), system("arm64", "v8"))
        self.assertEqual([1], chosen(arms, "linux/arm/v7"))
        self.assertEqual([1], chosen(arms, "linux/arm"))
        self.assertEqual([2], chosen(arms, "linux/arm/v6"))
        self.assertEqual([3], chosen(arms, "linux/arm64"))
        self.assertEqual([0], chosen(index(system("amd64"), system("amd64", "v3")), "linux/amd64"))

    def test_what_is_missing_is_told_with_what_there_is(self) -> None:
        """
        The error lists what could be requested.
        """
        with self.assertRaises(ValueError) as raised:
            chosen(index(system("amd64"), system("arm", "v7")), "linux/arm64")
        self.assertEqual("not for linux/arm64; its platforms: linux/amd64, linux/arm/v7", str(raised.exception))

    def test_all_platforms_are_all_manifests(self) -> None:
        """
        Without a platform everything that the index lists is fetched, attestations too, each once.
        """
        self.assertEqual([0, 1, 2], chosen(index(system("amd64"), system("unknown", name="unknown"), None)))


class DocumentTests(SynchronousTestCase):
    """
    Images in Kubernetes manifests and compose files.
    """

    def test_all_containers_of_all_documents_are_found(self) -> None:
        """
        Init containers, jobs within cron jobs, lists, and image volumes, each image once.
        """
        text = """
        kind: List
        items:
        - kind: CronJob
          spec: {jobTemplate: {spec: {template: {spec: {initContainers: [{image: a}], containers: [{image: b}]}}}}}
        - kind: Pod
          spec: {containers: [{image: a}], volumes: [{image: {reference: c}}]}
        ---
        # nothing
        ---
        kind: Deployment
        spec: {template: {spec: {containers: [{name: image, image: d}]}}}
        """
        self.assertEqual(["a", "b", "c", "d"], list(images_in(dedent(text), {})))

    def test_a_compose_file_is_read_with_its_variables(self) -> None:
        """
        Variables, their defaults, anchors and compose's own tags.
        """
        text = """
        x-base: &base {image: "${HOST:-r.test}/base:${TAG}"}
        services:
          one: *base
          two: {<<: *base, image: !override "$HOST/two$$"}
          three: {build: .}
        """
        self.assertEqual(["r.test/base:7", "/two$"], list(images_in(text, {"HOST": "", "TAG": "7"})))

    def test_a_variable_that_is_not_set_is_named(self) -> None:
        """
        It is not taken for an empty one.
        """
        for text in ("image: a:${TAG}", "image: a:$TAG"):
            with self.assertRaises(ValueError) as raised:
                list(images_in(text, {}))
            self.assertIn("TAG is not set", str(raised.exception))
        with self.assertRaises(ValueError):
            list(images_in("image: a:${TAG:?say it}", {"TAG": "1"}))

    def test_secrets_are_put_into_no_name(self) -> None:
        named = (
            *(
                "AWS_SECRET_ACCESS_KEY",
                "AWS_SESSION_TOKEN",
                "AWS_ACCESS_KEY_ID",
                "AWS_PROFILE",
                "aws_secret_access_key",
            ),
            *("ECR_PROXY_PASSWORD", "PROXY_HTPASSWD", "HTTPS_PROXY", "https_proxy", "ECRPROXY_WORKER"),
            *("GITHUB_TOKEN", "DB_PASSWORD", "DOCKER_AUTH_CONFIG", "SECRET", "NPM_TOKEN_RO", "API_KEY"),
        )
        for name in named:
            for text in (f"a:${name}", f"a:${{{name}}}", f"a:${{{name}:-x}}", f"a:$$${name}"):
                with self.assertRaises(ValueError) as raised:
                    list(images_in(f'image: "{text}"', {name: "hidden"}))
                self.assertIn(f"the variable {name} may hold a secret", str(raised.exception))
                self.assertNotIn("hidden", str(raised.exception))

    def test_account_and_region_may_stand_in_a_name(self) -> None:
        text = "image: ${AWS_ACCOUNT_ID}.dkr.ecr.${AWS_REGION}.amazonaws.com/app:$TAG"
        values = {"AWS_ACCOUNT_ID": "1", "AWS_REGION": "eu-west-1", "TAG": "2", "TOKENIZER_TAG": "3"}
        self.assertEqual(["1.dkr.ecr.eu-west-1.amazonaws.com/app:2"], list(images_in(text, values)))
        self.assertEqual(["a:3"], list(images_in("image: a:$TOKENIZER_TAG", values)))

    def test_what_is_no_yaml_is_one_line(self) -> None:
        """
        The error is one line, and nothing in a file is executed or grows without bounds.
        """
        with self.assertRaises(ValueError) as raised:
            list(images_in("a: [1\nb: }", {}))
        self.assertNotIn("\n", str(raised.exception))
        laughs = "a0: &a0 {image: x}\n" + "".join(
            f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
        )
        self.assertEqual(["x"], list(images_in(laughs, {})))
        with self.assertRaises(ValueError):
            list(images_in("[" * 5000, {}))
