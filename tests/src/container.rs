//! Containers through `ctr`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once, PoisonError};

use crate::command::{Command, Output, Running};
use crate::configuration::Configuration;
use crate::containerd::Containerd;
use crate::environment;
use crate::services::{self, Task};
use crate::terminal::Terminal;

/// `ctr` with these arguments.
pub fn ctr<S: AsRef<str>>(arguments: &[S]) -> Command {
    ctr_at(&Containerd::current(), arguments)
}

fn ctr_at<S: AsRef<str>>(containerd: &Containerd, arguments: &[S]) -> Command {
    let address = containerd.address().display().to_string();
    // Of its own accord it waits for ten seconds, which is not enough when dozens start at once on a slow machine.
    let words = ["ctr", "--connect-timeout=100s", "--address", &address];
    Command::new(&words.into_iter().chain(arguments.iter().map(AsRef::as_ref)).collect::<Vec<_>>())
}

/// A name that no other container of this containerd has.
pub fn new_id() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    format!("e2e-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// One `ctr run`.
pub struct Run {
    id: String,
    image: String,
    runtime: String,
    configuration: Option<PathBuf>,
    options: Vec<String>,
    words: Vec<String>,
    input: Option<Vec<u8>>,
    patient: bool,
}

impl Run {
    /// Runs this image.
    pub fn new(image: &str) -> Self {
        Self {
            id: new_id(),
            image: image.to_owned(),
            runtime: environment::runtime(),
            configuration: None,
            options: Vec::new(),
            words: Vec::new(),
            input: None,
            patient: false,
        }
    }

    /// With this container id.
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        id.clone_into(&mut self.id);
        self
    }

    /// With this runtime instead of the one under test.
    #[must_use]
    pub fn runtime(mut self, runtime: &str) -> Self {
        runtime.clone_into(&mut self.runtime);
        self
    }

    /// With this configuration.toml.
    #[must_use]
    pub fn configuration(mut self, path: &Path) -> Self {
        self.configuration = Some(path.to_owned());
        self
    }

    /// With further options of `ctr run`, separated by white space.
    #[must_use]
    pub fn options(mut self, options: &str) -> Self {
        self.options.extend(options.split_whitespace().map(str::to_owned));
        self
    }

    /// With an environment variable.
    #[must_use]
    pub fn env(mut self, variable: &str) -> Self {
        self.options.extend(["--env".to_owned(), variable.to_owned()]);
        self
    }

    /// With a directory or file of the host in the container.
    #[must_use]
    pub fn bind(self, source: &Path, target: &str, mode: &str) -> Self {
        let source = source.display();
        self.options(&format!("--mount type=bind,src={source},dst={target},options=rbind:{mode}"))
    }

    /// The process to run.
    #[must_use]
    pub fn command<S: AsRef<str>>(mut self, words: &[S]) -> Self {
        self.words = words.iter().map(|word| word.as_ref().to_owned()).collect();
        self
    }

    /// A shell script to run.
    #[must_use]
    pub fn sh(self, script: &str) -> Self {
        self.command(&["sh", "-c", script])
    }

    /// What the process reads.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// For much work: allows it several times as long.
    #[must_use]
    pub fn patiently(mut self) -> Self {
        self.patient = true;
        self
    }

    /// `ctr run --rm`, to the end.
    #[track_caller]
    pub fn output(self) -> Output {
        self.spawn().finish()
    }

    /// `ctr run --rm`, started.
    pub fn spawn(self) -> Running {
        self.ctr_run(&["--rm"]).spawn()
    }

    /// `ctr run --rm -t` on a terminal of this size.
    pub fn spawn_on_terminal(self, rows: u16, columns: u16) -> Terminal {
        Terminal::spawn(&self.ctr_run(&["--rm", "--tty"]), rows, columns)
    }

    /// `ctr run -d`.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn start(self) -> Container {
        let container = Container::adopt(&self.id);
        // Its standard streams would be FIFOs that nobody reads.
        self.detached().ok();
        container
    }

    /// `ctr run -d`, to its end. Nobody removes the container.
    #[track_caller]
    pub fn detached(self) -> Output {
        self.ctr_run(&["--detach", "--null-io"]).output()
    }

    /// `ctr run -d` of a container that lives until these tests end. For tests that share it.
    #[track_caller]
    pub fn start_for_all(self) -> Container {
        remove_at_exit(&self.id);
        self.start()
    }

    fn ctr_run(self, how: &[&str]) -> Command {
        let mut words = vec!["run".to_owned()];
        words.extend(how.iter().map(|&word| word.to_owned()));
        words.extend(["--runtime".to_owned(), self.runtime.clone()]);
        let needs_configuration = self.runtime != environment::RUNC;
        let configuration = self.configuration.or_else(Configuration::of_programs_elsewhere);
        if let (true, Some(path)) = (needs_configuration, configuration) {
            words.extend(["--runtime-config-path".to_owned(), path.display().to_string()]);
        }
        // A specification stands for image and options.
        let image = (!self.options.iter().any(|option| option == "--config")).then_some(self.image);
        words.extend(self.options.into_iter().chain(image).chain([self.id]).chain(self.words));
        let command = ctr(&words);
        let command = if self.patient { command.patiently() } else { command };
        match self.input {
            Some(input) => command.input(input),
            None => command,
        }
    }
}

/// A container that runs in the background. It is removed when this is dropped.
pub struct Container {
    id: String,
    containerd: Containerd,
}

impl Container {
    /// Takes over a container that something else created.
    pub fn adopt(id: &str) -> Self {
        Self { id: id.to_owned(), containerd: Containerd::current() }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// `ctr tasks VERB CONTAINER`, with options after the verb.
    #[track_caller]
    pub fn task(&self, verb: &str, options: &[&str]) -> Output {
        self.task_command(verb, options).output()
    }

    /// The same, to be run.
    pub fn task_command(&self, verb: &str, options: &[&str]) -> Command {
        ctr_at(&self.containerd, &[&["tasks", verb], options, &[&self.id]].concat())
    }

    /// The pid by which containerd knows its task.
    ///
    /// # Panics
    /// When it has none.
    #[track_caller]
    pub fn pid(&self) -> i32 {
        let pid = self.listed_task().and_then(|task| i32::try_from(task.pid).ok());
        pid.unwrap_or_else(|| panic!("{} has no task", self.id))
    }

    /// What containerd says about its task: RUNNING, STOPPED, PAUSED..., or nothing when there is none.
    #[track_caller]
    pub fn status(&self) -> Option<String> {
        self.listed_task().map(|task| task.status)
    }

    #[track_caller]
    fn listed_task(&self) -> Option<Task> {
        let tasks = services::expect(|| services::tasks(&self.containerd));
        tasks.into_iter().find(|task| task.container == self.id)
    }

    /// Waits for a status.
    ///
    /// # Panics
    /// When it does not come.
    #[track_caller]
    pub fn wait_for_status(&self, status: Option<&str>) {
        let come = crate::host::eventually(|| self.status().as_deref() == status);
        assert!(come, "{} is {:?}, and does not become {status:?}", self.id, self.status());
    }

    /// Waits until it has a task.
    ///
    /// # Panics
    /// When none comes.
    #[track_caller]
    pub fn wait_for_task(&self) {
        assert!(crate::host::eventually(|| self.status().is_some()), "{} has no task", self.id);
    }

    /// Deletes its task, which has ended with this exit code. `ctr` returns the code as its own, or prints it in a
    /// warning.
    ///
    /// # Panics
    /// When it cannot be deleted, or has ended otherwise.
    #[track_caller]
    pub fn delete_task(&self, code: i32) {
        let output = self.task("delete", &[]);
        let reported =
            output.code == code || output.code == 0 && output.errors().contains(&format!("exit code {code}"));
        assert!(reported, "expected the exit code {code}\n{output}");
    }

    /// A command to be executed in it: `ctr tasks exec`.
    pub fn exec_command<S: AsRef<str>>(&self, options: &[&str], words: &[S]) -> Command {
        let own_id = new_id();
        let named = options.contains(&"--exec-id");
        let mut all = vec!["tasks", "exec"];
        if !named {
            all.extend(["--exec-id", &own_id]);
        }
        all.extend(options);
        all.push(&self.id);
        all.extend(words.iter().map(AsRef::as_ref));
        ctr_at(&self.containerd, &all)
    }

    /// Executes a command in it.
    #[track_caller]
    pub fn exec<S: AsRef<str>>(&self, words: &[S]) -> Output {
        self.exec_command(&[], words).output()
    }

    /// Executes a shell script in it.
    #[track_caller]
    pub fn sh(&self, script: &str) -> Output {
        self.exec(&["sh", "-c", script])
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Most are gone by then. What cannot be asked for is removed.
        let has_task = services::tasks(&self.containerd)
            .map_or(true, |tasks| tasks.iter().any(|task| task.container == self.id));
        let is_there = services::containers(&self.containerd).map_or(true, |all| all.contains(&self.id));
        if has_task || is_there {
            remove(&self.containerd, &self.id);
        }
    }
}

fn remove(containerd: &Containerd, id: &str) {
    let address = containerd.address();
    // Either may be gone already, and a test that fails must not hide its reason behind a second panic.
    let quietly = |words: &[&str]| {
        let mut command = std::process::Command::new("timeout");
        let _ = command.args(["60", "ctr", "--address"]).arg(&address).args(words).output();
    };
    quietly(&["tasks", "delete", "--force", id]);
    quietly(&["containers", "delete", id]);
}

static TO_REMOVE: Mutex<Vec<(Containerd, String)>> = Mutex::new(Vec::new());

/// Statics are not dropped.
fn remove_at_exit(id: &str) {
    extern "C" fn remove_all() {
        for (containerd, id) in TO_REMOVE.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            remove(&containerd, &id);
        }
    }
    static REGISTER: Once = Once::new();
    // SAFETY: the function is safe to call at exit: it takes a lock that nobody holds for long, and starts processes.
    REGISTER.call_once(|| unsafe {
        libc::atexit(remove_all);
    });
    TO_REMOVE.lock().unwrap_or_else(PoisonError::into_inner).push((Containerd::current(), id.to_owned()));
}
