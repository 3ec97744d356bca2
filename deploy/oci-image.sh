#!/usr/bin/env bash
# oci-image.sh REFERENCE ARCHIVE ROOTFS USER ENTRYPOINT...
# Packs a directory as an image of one layer, with no daemon and no registry. The archive is an OCI layout and a Docker
# archive at once: `ctr image import`, `docker load` and skopeo all take it. The same input gives the same bytes.
set -euo pipefail

reference=$1 archive=$2 rootfs=$3 user=$4
shift 4

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
blobs=$work/blobs/sha256
mkdir -p "$blobs"

pack() {
    tar --create --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --format=gnu --directory "$1" "${@:2}"
}

# Moves a file to its place among the blobs and prints its digest.
store() {
    local digest
    digest=$(sha256sum "$1" | cut -d' ' -f1)
    mv "$1" "$blobs/$digest"
    echo "$digest"
}

size() {
    stat -c %s "$blobs/$1"
}

case $(uname -m) in
    x86_64) architecture=amd64 ;;
    aarch64) architecture=arm64 ;;
    *) architecture=$(uname -m) ;;
esac

pack "$rootfs" . >"$work/layer"
layer=$(store "$work/layer")

entrypoint=$(jq --null-input --compact-output '$ARGS.positional' --args -- "$@")
jq --null-input --arg arch "$architecture" --arg layer "sha256:$layer" --arg user "$user" --argjson entrypoint "$entrypoint" '{
    created: "1970-01-01T00:00:00Z", architecture: $arch, os: "linux",
    config: { User: $user, Entrypoint: $entrypoint, WorkingDir: "/",
              Env: ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"] },
    rootfs: { type: "layers", diff_ids: [$layer] },
    history: [{ created: "1970-01-01T00:00:00Z" }]
}' >"$work/config"
config=$(store "$work/config")

jq --null-input --arg config "sha256:$config" --argjson config_size "$(size "$config")" \
    --arg layer "sha256:$layer" --argjson layer_size "$(size "$layer")" '{
    schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json",
    config: { mediaType: "application/vnd.oci.image.config.v1+json", digest: $config, size: $config_size },
    layers: [{ mediaType: "application/vnd.oci.image.layer.v1.tar", digest: $layer, size: $layer_size }]
}' >"$work/manifest"
manifest=$(store "$work/manifest")

# containerd and the kubelet know an image by its full name, in which Docker Hub's host is spelled out.
full=$reference
[[ ${reference%%/*} == *.* || ${reference%%/*} == localhost ]] || full=docker.io/$reference

jq --null-input --arg digest "sha256:$manifest" --argjson size "$(size "$manifest")" --arg name "$full" '{
    schemaVersion: 2, mediaType: "application/vnd.oci.image.index.v1+json",
    manifests: [{ mediaType: "application/vnd.oci.image.manifest.v1+json", digest: $digest, size: $size,
                  annotations: { "io.containerd.image.name": $name, "org.opencontainers.image.ref.name": ($name | split(":") | last) } }]
}' >"$work/index.json"
jq --null-input --compact-output --arg name "$reference" --arg config "blobs/sha256/$config" --arg layer "blobs/sha256/$layer" \
    '[{ Config: $config, RepoTags: [$name], Layers: [$layer] }]' >"$work/manifest.json"
echo '{"imageLayoutVersion":"1.0.0"}' >"$work/oci-layout"

mkdir -p "$(dirname "$archive")"
pack "$work" blobs index.json manifest.json oci-layout >"$archive.new"
mv "$archive.new" "$archive"
