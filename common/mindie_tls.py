"""The keys with which MindIE's config.json names certificates: known, and without effect until TLS is built.

Their defaults are MindIE's, so that a file that has them all and never changed them gives no warnings.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from common.section import Ignored, Section

NO_TLS = Ignored("TLS is not built in this version")
File = Annotated[str | None, NO_TLS]
Files = Annotated[tuple[str, ...] | None, Field(min_length=1, max_length=3), NO_TLS]


class ServerTls(Section):
    """The certificates of `ServerConfig`: for clients, management, metrics, and between instances."""

    tls_ca_path: File = "security/ca/"
    tls_ca_file: Files = ("ca.pem",)
    tls_cert: File = "security/certs/server.pem"
    tls_pk: File = "security/keys/server.key.pem"
    tls_pk_pwd: File = "security/pass/key_pwd.txt"
    tls_crl_path: File = "security/certs/"
    tls_crl_files: Files = ("server_crl.pem",)
    management_tls_ca_path: File = None
    management_tls_ca_file: Files = ("management_ca.pem",)
    management_tls_cert: File = "security/certs/management/server.pem"
    management_tls_pk: File = "security/keys/management/server.key.pem"
    management_tls_pk_pwd: File = "security/pass/management/key_pwd.txt"
    management_tls_crl_path: File = "security/management/certs/"
    management_tls_crl_files: Files = ("server_crl.pem",)
    metrics_tls_ca_path: File = None
    metrics_tls_ca_file: Files = ("metrics_ca.pem",)
    metrics_tls_cert: File = "security/certs/metrics/server.pem"
    metrics_tls_pk: File = "security/keys/metrics/server.key.pem"
    metrics_tls_pk_pwd: File = "security/pass/metrics/key_pwd.txt"
    metrics_tls_crl_path: File = "security/metrics/certs/"
    metrics_tls_crl_files: Files = ("server_crl.pem",)
    inter_comm_tls_ca_path: File = "security/grpc/ca/"
    inter_comm_tls_ca_files: Files = ("ca.pem",)
    inter_comm_tls_cert: File = "security/grpc/certs/server.pem"
    inter_comm_pk: File = "security/grpc/keys/server.key.pem"
    inter_comm_pk_pwd: File = "security/grpc/pass/key_pwd.txt"
    inter_comm_tls_crl_path: File = "security/grpc/certs/"
    inter_comm_tls_crl_files: Files = ("server_crl.pem",)
    kmc_ksf_master: File = "tools/pmt/master/ksfa"
    kmc_ksf_standby: File = "tools/pmt/standby/ksfb"


class BackendTls(Section):
    """The certificates of `BackendConfig`: between the nodes of one model."""

    inter_node_tls_ca_path: File = "security/grpc/ca/"
    inter_node_tls_ca_files: Files = ("ca.pem",)
    inter_node_tls_cert: File = "security/grpc/certs/server.pem"
    inter_node_tls_pk: File = "security/grpc/keys/server.key.pem"
    inter_node_tls_pk_pwd: File = "security/grpc/pass/mindie_server_key_pwd.txt"
    inter_node_tls_crl_path: File = "security/grpc/certs/"
    inter_node_tls_crl_files: Files = ("server_crl.pem",)
    inter_node_kmc_ksf_master: File = "tools/pmt/master/ksfa"
    inter_node_kmc_ksf_standby: File = "tools/pmt/standby/ksfb"
