//! What people run in containers, and what it needs of a file system.

use std::sync::OnceLock;

use katana_tests::turn::shared;
use katana_tests::{Container, DEBIAN, POSTGRES, Run, Scratch};

use crate::guest;

/// One Debian for all tests here, with this program in it.
fn debian() -> &'static Container {
    static CONTAINER: OnceLock<Container> = OnceLock::new();
    CONTAINER.get_or_init(|| guest::mounted(Run::new(DEBIAN)).command(&["sleep", "100000"]).start_for_all())
}

fn inside(module: &str) {
    let _turn = shared();
    let exec = debian().exec_command(&[], &guest::command(module, "/var/tmp"));
    guest::expect_passed(exec.patiently().output());
}

#[test]
fn ownership_and_permissions() {
    inside("guest::permissions");
}

#[test]
fn special_bits_and_who_may_keep_them() {
    inside("guest::special_bits");
}

#[test]
fn names_and_directories() {
    inside("guest::names");
}

#[test]
fn extended_attributes() {
    inside("guest::attributes");
}

#[test]
fn hard_links_renames_and_open_files() {
    inside("guest::files");
}

#[test]
fn shared_mappings_sparse_files_and_synchronisation() {
    inside("guest::contents");
}

#[test]
fn access_control_lists() {
    inside("guest::acls");
}

#[test]
fn files_without_a_name() {
    inside("guest::unnamed");
}

#[test]
fn inodes_have_more_than_a_mode() {
    inside("guest::inodes");
}

#[test]
fn ten_thousand_small_files() {
    inside("guest::many");
}

/// A volume is another file system than the root, and takes another way to the host.
#[test]
fn the_same_on_a_volume() {
    let _turn = shared();
    let scratch = Scratch::new();
    let run = guest::mounted(Run::new(DEBIAN)).bind(scratch.path(), "/volume", "rw");
    let modules = [
        "permissions",
        "acls",
        "special_bits",
        "names",
        "attributes",
        "inodes",
        "files",
        "unnamed",
        "contents",
    ];
    let filters: Vec<String> = modules.iter().map(|module| format!("guest::{module}")).collect();
    let words = guest::command(&filters.join(" "), "/volume");
    guest::expect_passed(run.command(&words).patiently().output());
}

#[test]
fn apt_get_installs_packages() {
    let _turn = shared();
    let script = "set -e; export DEBIAN_FRONTEND=noninteractive
        apt-get update && apt-get install -y hello jq
        hello; echo '{\"a\": [1, 2]}' | jq -c .a; dpkg --audit; apt-get purge -y hello; ! test -e /usr/bin/hello";
    let output = debian().exec_command(&[], &["sh", "-c", script]).patiently().output().ok();
    let text = output.text();
    assert!(text.contains("Hello, world!") && text.contains("\n[1,2]\n"), "{output}");
}

const PYTHON: &str = r"
import hashlib, json, os, socket, subprocess, tempfile, threading, multiprocessing

with tempfile.TemporaryDirectory() as directory:
    path = os.path.join(directory, 'file')
    with open(path, 'w') as file:
        json.dump({'numbers': list(range(1000))}, file)
    assert sum(json.load(open(path))['numbers']) == 499500
assert not os.path.exists(directory)

assert subprocess.run(['sh', '-c', 'exit 3']).returncode == 3
assert subprocess.check_output(['id', '-u']).strip() == b'0'

server = socket.create_server(('127.0.0.1', 0))
def answer():
    connection, _ = server.accept()
    connection.sendall(connection.recv(100)[::-1])
    connection.close()
threading.Thread(target=answer).start()
client = socket.create_connection(server.getsockname())
client.sendall(b'abc')
assert client.recv(100) == b'cba'

def work(number):
    return hashlib.sha256(b'x' * number).hexdigest()[:2]
with multiprocessing.Pool(2) as pool:
    assert len(pool.map(work, range(50))) == 50
print('python is well')
";

#[test]
fn python_works() {
    let _turn = shared();
    debian()
        .exec_command(&[], &["python3", "-"])
        .input(PYTHON)
        .patiently()
        .output()
        .ok()
        .expect_text("python is well");
}

/// In the write-ahead mode, processes share memory by mapping a file.
const SQLITE: &str = r"
import os, sqlite3, sys

path = '/var/tmp/base.sqlite'
def connect():
    connection = sqlite3.connect(path, timeout=60)
    connection.execute('pragma synchronous=full')
    return connection

base = connect()
assert base.execute('pragma journal_mode=wal').fetchone() == ('wal',)
base.execute('create table numbers (process int, number int, text text)')
base.commit()
children = []
for process in range(3):
    pid = os.fork()
    if pid == 0:
        own = connect()
        for number in range(30):
            with own:
                own.execute('insert into numbers values (?, ?, ?)', (process, number, 'x' * 500))
        os._exit(0)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
assert base.execute('select count(*), count(distinct process) from numbers').fetchone() == (90, 3)
assert base.execute('pragma integrity_check').fetchone() == ('ok',)
print('sqlite is well')
";

#[test]
fn sqlite_works_with_several_writers() {
    let _turn = shared();
    let output = debian().exec_command(&[], &["python3", "-"]).input(SQLITE).patiently().output();
    output.ok().expect_text("sqlite is well");
    let script =
        "sqlite3 /var/tmp/base.sqlite 'select sum(number) from numbers; vacuum;' && rm /var/tmp/base.sqlite*";
    debian().sh(script).ok().expect_text("1305");
}

#[test]
fn postgres_works() {
    let _turn = shared();
    let script = "set -e; cd /tmp; initdb --pgdata=/tmp/db --auth=trust >/tmp/initdb.log 2>&1 || { cat /tmp/initdb.log; exit 1; }
        pg_ctl --pgdata=/tmp/db --options='-k /tmp -c listen_addresses=' --log=/tmp/log --wait start >/dev/null || { cat /tmp/log; exit 1; }
        ask() { psql --host=/tmp --dbname=postgres --quiet --tuples-only --no-align --command=\"$1\"; }
        ask 'create table t as select n, md5(n::text) as h from generate_series(1, 5000) n; create index on t (h)'
        ask \"select count(*), max(n) from t where h >= '8'\" > /tmp/before
        pg_ctl --pgdata=/tmp/db --mode=immediate stop >/dev/null
        pg_ctl --pgdata=/tmp/db --options='-k /tmp -c listen_addresses=' --log=/tmp/log --wait start >/dev/null || { cat /tmp/log; exit 1; }
        ask \"select count(*), max(n) from t where h >= '8'\" > /tmp/after
        cmp /tmp/before /tmp/after; ask 'select count(*) from t'; pg_ctl --pgdata=/tmp/db stop >/dev/null";
    Run::new(POSTGRES).sh(script).patiently().output().ok().expect_text("5000");
}
