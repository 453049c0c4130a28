#!/bin/sh
# usage: install.sh [--user] [--prefix DIR] [--python PYTHON] [--online] [--no-warm] [--no-service]
#        install.sh --uninstall [--purge] [--user] [--prefix DIR]
#
# Install edgeq on 64-bit Raspberry Pi OS or Debian, from the bundle that this script lies in, or
# from the checkout that it lies in with --online. Running it again is harmless.
#   as root       /opt/edgeq, command /usr/local/bin/edgeq, system user edgeq, systemd unit
#   otherwise     ~/.local/share/edgeq, command ~/.local/bin/edgeq (--user: also when root)
# At the end the model answers once, for the user who installs: that compiles the kernels for this
# CPU, which takes minutes on a board (--no-warm: later). Compiled kernels serve one user alone.
# --uninstall removes these; models, compiled kernels and the user stay, unless --purge.
# It changes nothing else: what it would advise, such as swap, it only says.
set -eu
umask 022

say() { printf '%s\n' "$*" >&2; }
fail() { say "install.sh: $*"; exit 2; }

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
prefix='' python='' online='' warm=yes service=yes remove='' purge='' system=''
[ "$(id -u)" -ne 0 ] || system=yes
while [ $# -gt 0 ]; do
  case $1 in
    --user) system='' ;;
    --prefix) [ $# -gt 1 ] || fail "--prefix needs a folder"; prefix=$2; shift ;;
    --python) [ $# -gt 1 ] || fail "--python needs a program"; python=$2; shift ;;
    --online) online=yes ;;
    --no-warm) warm='' ;;
    --no-service) service='' ;;
    --uninstall) remove=yes ;;
    --purge) purge=yes ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" | sed '$d'; exit 0 ;;
    *) fail "$1: unknown: see install.sh --help" ;;
  esac
  shift
done

[ "$remove" ] || [ -z "$purge" ] || fail "--purge: expected with --uninstall"
root=${EDGEQ_ROOT:-} # for tests: a folder in place of /
if [ "$system" ]; then
  prefix=${prefix:-$root/opt/edgeq} bin=$root/usr/local/bin state=$root/var/lib/edgeq
  kernels=$root/var/cache/edgeq units=$root/etc/systemd/system
else
  [ "${HOME:-}" ] || fail "HOME is not set"
  prefix=${prefix:-$HOME/.local/share/edgeq} bin=$HOME/.local/bin units=''
  kernels=${XDG_CACHE_HOME:-$HOME/.cache}/edgeq
fi
prefix=$(realpath -ms -- "$prefix")
[ "$prefix" != / ] || fail "--prefix /: expected a folder of its own"
[ "$system" ] || state=$prefix
unit=edgeq-warm@.service

ours() { [ -f "$prefix/.edgeq-installed" ]; }
running_systemd() { [ -d /run/systemd/system ] && command -v systemctl >/dev/null; }

# -- removing ---------------------------------------------------------------------------------------
uninstall() {
  ours || fail "$prefix: was not made by this script, or is removed already: left alone"
  rm -rf "$prefix"/venv "$prefix"/venv-*
  if [ -L "$bin/edgeq" ] && [ "$(readlink "$bin/edgeq")" = "$prefix/venv/bin/edgeq" ]; then
    rm -f "$bin/edgeq"
  fi
  if [ "$units" ] && [ -f "$units/$unit" ]; then
    rm -f "$units/$unit"
    if running_systemd; then systemctl daemon-reload; fi
  fi
  if [ "$purge" ]; then
    rm -rf "$state/models" "$kernels"
    if [ "$system" ]; then
      rm -rf "$state"
      if id edgeq >/dev/null 2>&1; then userdel edgeq; fi
    fi
  fi
  if [ ! -d "$state/models" ]; then # while there are models, --purge has to know that they are ours
    rm -f "$prefix/.edgeq-installed"
    rmdir "$prefix" 2>/dev/null || true
  fi
  say "edgeq is removed${purge:+, models and compiled kernels too}"
}

# -- checking ---------------------------------------------------------------------------------------
check_machine() {
  [ "$(uname -s)" = Linux ] || fail "$(uname -s): expected Linux"
  bits=$(getconf LONG_BIT 2>/dev/null || echo 64)
  case $(uname -m) in
    aarch64 | x86_64) ;;
    *) bits=32 ;;
  esac
  [ "$bits" = 64 ] || fail "this system is 32-bit ($(uname -m)): edgeq needs a 64-bit one:" \
    "install Raspberry Pi OS (64-bit) or Debian arm64"
  machine=$(uname -m)
}

find_python() {
  if [ "$python" ]; then set -- "$python"; else set -- python3 python3.13 python3.12 python3.11; fi
  for python in "$@"; do
    if "$python" -c 'import struct, sys, venv
sys.exit(sys.version_info < (3, 11) or struct.calcsize("P") < 8)' 2>/dev/null; then
      return
    fi
  done
  fail "$*: no 64-bit Python 3.11 or newer with its venv module: sudo apt install python3-venv"
}

# What runs as a service must be where its unit may look, by a name that it can hold.
check_prefix() {
  case ${prefix#"$root"/} in
    *[!A-Za-z0-9/._+-]*) fail "$prefix: expected letters, digits and . _ + - in the folder's name" ;;
    home/* | root/* | run/* | tmp/* | var/tmp/*)
      fail "$prefix: hidden from services: use another --prefix, or --no-service" ;;
  esac
}

check_bundle() {
  [ -f "$here/SHA256SUMS" ] || fail "$here is no bundle: make one with edgeq deploy, or use --online"
  (cd "$here" && sha256sum --check --quiet --strict SHA256SUMS >&2) \
    || fail "$here: files are damaged or missing: copy the bundle again"
  made_for=$(sed -n 's/^ "machine": "\(.*\)",$/\1/p' "$here/manifest.json")
  [ "$made_for" = "$machine" ] || fail "this bundle is for $made_for, this machine is $machine:" \
    "make one with edgeq deploy --machine $machine"
}

listed() { # FOLDER ENDING: files of the bundle, as its sums name them
  sed -n "s|^[0-9a-f]\{64\}  \($1/[^/]*\.$2\)\$|\1|p" "$here/SHA256SUMS"
}

# -- installing -------------------------------------------------------------------------------------
# Each state of the bundle gets a folder of its own; the link to it is changed when it is complete.
make_venv() {
  if [ "$online" ]; then
    key=online-$(date +%Y%m%d%H%M%S)
  else
    key=$("$python" -VV | cat - "$here/SHA256SUMS" | sha256sum | cut -c1-12)
  fi
  venv=$prefix/venv-$key
  if [ ! -f "$venv/.complete" ]; then
    say "installing to $venv"
    rm -rf "$venv"
    if [ "$online" ]; then install_online; else install_bundle; fi
    : >"$venv/.complete"
  fi
  ln -sfn "$venv" "$prefix/venv.new"
  mv -T "$prefix/venv.new" "$prefix/venv"
  for old in "$prefix"/venv-*; do
    [ "$old" = "$venv" ] || rm -rf "$old"
  done
}

# pip runs from its own wheel: the package python3-venv need not be there.
install_bundle() {
  "$python" -m venv --without-pip "$venv"
  pip=''
  set --
  while IFS= read -r wheel; do
    set -- "$@" --find-links "$here/$wheel"
    case $wheel in wheels/pip-*) pip=$here/$wheel/pip ;; esac
  done <<EOF_WHEELS
$(listed wheels whl)
EOF_WHEELS
  [ "$pip" ] || fail "$here/wheels: pip is missing: make the bundle again"
  PYTHONDONTWRITEBYTECODE=1 "$venv/bin/python" "$pip" --isolated --disable-pip-version-check \
    install --quiet --no-cache-dir --no-index "$@" edgeq \
    || fail "no packages in $here/wheels for $("$python" -V): make the bundle with" \
      "edgeq deploy --python $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
}

install_online() {
  "$python" -m venv "$venv" || fail "venv lacks pip: sudo apt install python3-venv"
  "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$here/../.." \
    || fail "pip cannot install edgeq: is this machine online?"
}

make_user() {
  id edgeq >/dev/null 2>&1 || useradd --system --user-group --home-dir "$state" \
    --shell /usr/sbin/nologin --comment "edgeq language models" edgeq
}

copy_models() {
  if [ "$system" ]; then # root's own: nobody else can put a link there
    install -d -m 0755 -o root -g root "$state" "$state/models"
  else
    mkdir -p "$state/models"
  fi
  [ "$online" ] || listed models gguf | while IFS= read -r model; do
    target=$state/$model
    if [ -L "$target" ] || ! cmp -s "$here/$model" "$target"; then
      install -m 0644 "$here/$model" "$target.part"
      mv -T "$target.part" "$target"
    fi
  done
}

make_unit() {
  [ -d "$units" ] || { say "no systemd here: no unit installed"; return; }
  sed "s|/opt/edgeq/|$prefix/|" "$here/$unit" >"$units/$unit.new"
  mv "$units/$unit.new" "$units/$unit"
  if running_systemd; then systemctl daemon-reload; fi
}

# Kernels are compiled for one user, who alone can write them: here the one who asked for all this.
warm_up() {
  who=''
  if [ "$system" ]; then
    who=${SUDO_USER:-root}
    [ "$who" != root ] || { say "the first start of each user compiles kernels"; return; }
  fi
  [ "$online" ] || listed models gguf | while IFS= read -r model; do
    say "first start of $model${who:+ for $who}: compiling takes minutes on a board"
    set -- "$prefix/venv/bin/edgeq" run "$state/$model" --raw -n 4 -p "The weather is fine today"
    if [ "$who" ]; then set -- sudo -H -u "$who" -- "$@"; fi
    "$@" >&2 </dev/null || say "$model does not answer: see edgeq doctor"
  done
}

advise() {
  ram=$(($(sed -n 's/^MemTotal: *\([0-9]*\) kB$/\1/p' /proc/meminfo) / 1024))
  swap=$(($(sed -n 's/^SwapTotal: *\([0-9]*\) kB$/\1/p' /proc/meminfo) / 1024))
  if [ "$ram" -lt 1100 ] && [ "$swap" -lt 256 ]; then
    say "advice: $ram MB of RAM and $swap MB of swap: for the first start, which compiles, add zram:"
    say "  sudo apt install zram-tools"
  fi
  if "$prefix/venv/bin/edgeq" --help | grep -q '^  doctor '; then
    "$prefix/venv/bin/edgeq" doctor >&2 || true
  fi
}

main() {
  check_machine
  find_python
  if [ "$system" ] && [ "$service" ]; then check_prefix; fi
  if [ "$online" ]; then
    grep -qs '^name = "edgeq"$' "$here/../../pyproject.toml" || fail "--online: $here: expected a" \
      "checkout of edgeq around this script: use a bundle, made with edgeq deploy"
  else
    check_bundle
  fi
  if [ -e "$prefix" ] && ! ours && [ "$(ls -A "$prefix")" ]; then
    fail "$prefix: exists and was not made by this script: use another --prefix"
  fi
  mkdir -p "$prefix" "$bin"
  : >"$prefix/.edgeq-installed"
  make_venv
  if [ -e "$bin/edgeq" ] && [ ! -L "$bin/edgeq" ]; then
    say "$bin/edgeq: exists and is no link: left alone; use $prefix/venv/bin/edgeq"
  else
    ln -sfn "$prefix/venv/bin/edgeq" "$bin/edgeq"
  fi
  if [ "$system" ]; then make_user; fi
  copy_models
  if [ "$units" ] && [ "$service" ]; then make_unit; fi
  advise
  if [ "$warm" ]; then warm_up; fi
  say "edgeq is installed: $bin/edgeq run $state/models/MODEL.gguf"
}

if [ "$remove" ]; then uninstall; else main; fi
