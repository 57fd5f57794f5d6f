#!/usr/bin/env bash
# A real S3 server for the tests: Ceph's RADOS gateway over one in-memory OSD, on loopback, installed nowhere.
#   rgw.sh install        unpack Debian's packages into the cache (once, some 300 MB; needs apt-get and dpkg)
#   rgw.sh start DIR PORT [PID]
#                         serve http://127.0.0.1:PORT (its monitor takes PORT+1); keys "testkey" and "testsecret"; until
#                         the process PID is gone, where it is given; exits with 3 where somebody else has a port
#   rgw.sh stop DIR       end what start started
set -euo pipefail
command=${1:?usage: rgw.sh install|start|stop [DIR] [PORT] [PID]}
cache=${UNCLIP_RGW_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/unclip/radosgw}
libraries=$cache/usr/lib/$(uname -m)-linux-gnu

install_packages() {
  [[ -e $cache/complete ]] && return
  command -v apt-get >/dev/null || { echo "rgw.sh: needs Debian's apt-get" >&2; exit 1; }
  rm -rf "$cache"; mkdir -p "$cache/archives/partial"
  apt-get install -y -q --no-install-recommends --download-only -o Debug::NoLocking=1 \
    -o "Dir::Cache::archives=$cache/archives" radosgw ceph-mon ceph-osd >"$cache/apt.log" 2>&1 ||
    { tail -3 "$cache/apt.log" >&2; echo "rgw.sh: run apt-get update, then try again" >&2; exit 1; }
  local package
  for package in "$cache"/archives/*.deb; do dpkg -x "$package" "$cache"; done
  rm -rf "$cache/archives"
  touch "$cache/complete"
}

stop_daemons() {  # the last started first
  [[ -e $1/pids ]] || return 0
  local pid
  for pid in $(tac "$1/pids"); do kill -9 "$pid" 2>/dev/null || true; done
  rm -f "$1/pids"
}

write_configuration() {  # $1 folder, $2 port
  cat >"$1/ceph.conf" <<CONF
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = [v2:127.0.0.1:$(($2 + 1))]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr1 = false
ms mon client mode = crc
auth cluster required = none
auth service required = none
auth client required = none
keyring = $1/keyring
mon data = $1/mon
osd data = $1/osd
rgw data = $1/rgw
run dir = $1/run
admin socket = $1/run/\$name.asok
pid file = $1/run/\$name.pid
log file = $1/log/\$name.log
mon cluster log file = $1/log/cluster.log
plugin dir = $libraries/ceph
erasure code dir = $libraries/ceph/erasure-code
osd class dir = $libraries/rados-classes
osd objectstore = memstore
memstore device bytes = 1073741824
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon data avail crit = 1
paxos propose interval = 0.05
paxos min wait = 0.01
rgw frontends = beast endpoint=127.0.0.1:$2 tcp_nodelay=1
rgw thread pool size = 16
rgw run sync thread = false
CONF
}

listening() {  # $1 port: the socket that listens there, if there is one
  awk -v at="0100007F:$(printf %04X "$1")" '$2 == at && $4 == "0A" {print "socket:[" $10 "]"}' /proc/net/tcp
}

wait_until_it_listens() {  # $1 pid, $2 port: a connection would not tell our server from another one
  local attempt socket
  for attempt in $(seq 1200); do
    socket=$(listening "$2")
    if [[ -n $socket ]] && readlink "/proc/$1/fd"/* 2>/dev/null | grep -qxF "$socket"; then return; fi
    kill -0 "$1" 2>/dev/null || { [[ -z $socket ]] || return 3; return 1; }
    sleep 0.05
  done
  return 1
}

start_daemons() {  # $1 folder, $2 port
  export LD_LIBRARY_PATH=$libraries:$cache/lib/$(uname -m)-linux-gnu:$libraries/ceph
  export CEPH_CONF=$1/ceph.conf PATH=$cache/usr/bin:$PATH PYTHONPATH=$cache/usr/lib/python3/dist-packages
  [[ -z $(listening "$2")$(listening $(($2 + 1))) ]] || return 3
  local osd; osd=$(cat /proc/sys/kernel/random/uuid)
  ceph-authtool --create-keyring "$1/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
  monmaptool --create --addv a "[v2:127.0.0.1:$(($2 + 1))]" \
    --fsid "$(sed -n 's/^fsid = //p' "$1/ceph.conf")" "$1/monmap" >/dev/null
  ceph-mon --mkfs -i a --monmap "$1/monmap" --keyring "$1/keyring"
  ceph-mon -f -i a >"$1/log/mon.out" 2>&1 & echo $! >>"$1/pids"
  wait_until_it_listens $! $(($2 + 1)) || return
  timeout 60 /usr/bin/python3 "$cache/usr/bin/ceph" osd new "$osd" >"$1/log/osd-new.out" 2>&1
  ceph-osd -i 0 --mkfs --osd-uuid "$osd" >"$1/log/mkfs.out" 2>&1
  ceph-osd -f -i 0 >"$1/log/osd.out" 2>&1 & echo $! >>"$1/pids"
  timeout 90 radosgw-admin user create --uid=test --display-name=test \
    --access-key=testkey --secret-key=testsecret >"$1/log/user.out" 2>&1
  radosgw -f -n client.admin >"$1/log/rgw.out" 2>&1 & echo $! >>"$1/pids"
  wait_until_it_listens $! "$2"
}

stop_with() {  # $1 folder, $2 pid
  while kill -0 "$2" 2>/dev/null; do sleep 1; done
  stop_daemons "$1"
}

case $command in
  install) install_packages ;;
  stop) stop_daemons "$(realpath -m "${2:?folder}")" ;;
  start)
    folder=$(realpath -m "${2:?folder}"); port=${3:?port}
    [[ -e $cache/complete ]] || { echo "rgw.sh: not installed; run: tests/rgw.sh install" >&2; exit 1; }
    stop_daemons "$folder"
    rm -rf "$folder"/{mon,osd,rgw,log,run,keyring,monmap}  # an earlier server's, whose objects were in memory
    mkdir -p "$folder"/{mon,osd,rgw,log,run}
    write_configuration "$folder" "$port"
    code=0; start_daemons "$folder" "$port" || code=$?
    if [[ $code != 0 ]]; then
      echo "rgw.sh: the server did not come up, see $folder/log" >&2
      stop_daemons "$folder"
      exit "$code"
    fi
    if [[ -n ${4:-} ]]; then stop_with "$folder" "$4" </dev/null >/dev/null 2>&1 & fi ;;
  *) echo "rgw.sh: unknown command $command" >&2; exit 2 ;;
esac
