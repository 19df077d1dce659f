//! The ends of containers, of the machine after the last of them, and of the shim.

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse};
use containerd_shim_protos::events::task::TaskDelete;

use super::Pod;
use super::container::Container;
use super::process::Exit;
use crate::error::Result;
use crate::host::events::timestamp;

impl Pod {
    /// Delete: of an exec, or of the container and with the pod's last one of the machine.
    pub async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse> {
        let container = self.container(&request.id)?;
        if !request.exec_id.is_empty() {
            let (pid, exit) = container.delete_exec(&request.exec_id).await?;
            return Ok(deleted(pid, exit));
        }
        let pid = container.pid;
        // containerd's sandbox is there without a container.
        let guest_goes_on = self.containers().len() > 1 || self.sandboxed.get().is_some();
        let exit = container.delete(guest_goes_on).await?;
        self.containers().remove(&request.id);
        self.remove_limits(&container).await;
        self.end_if_empty().await;
        self.events.publish(&TaskDelete {
            container_id: request.id,
            pid,
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        });
        Ok(deleted(pid, exit))
    }

    /// A container is gone, and the machine of those that stay shrinks.
    async fn remove_limits(&self, container: &Container) {
        let mut limits = self.limits.lock().await;
        limits.remove(&container.id);
        if !self.containers().is_empty()
            && !container.machine.is_dead()
            && let Err(e) = container.machine.fit(&limits.total()).await
        {
            log::warn!("the machine does not shrink: {e}");
        }
    }

    pub(super) async fn end_if_empty(&self) {
        if self.sandboxed.get().is_some() {
            return;
        }
        let mut machine = self.machine.lock().await;
        // Looked at under the lock: a Create takes its place first and this lock second.
        if self.containers().is_empty()
            && let Some(machine) = machine.take()
        {
            self.launched.send_replace(None);
            machine.end().await;
        }
    }

    /// Shutdown: the shim ends, unless there are containers. For the sandbox of a pod of the Sandbox service,
    /// containerd says so when it does not know the pod any more.
    pub async fn shut_down(&self, id: &str) {
        if self.sandboxed.get().is_some() && id == self.id() {
            self.shut_down_with_all().await;
        } else if self.containers().is_empty() {
            // The Delete of the last one may be about to end the machine: a containerd that was restarted meanwhile
            // does not know.
            self.end_if_empty().await;
            if self.containers().is_empty() {
                self.stop.send_replace(true);
            }
        }
    }

    /// The machine and the shim end, whatever is in them.
    pub async fn shut_down_with_all(&self) {
        self.abandon().await;
        self.containers().clear();
        self.stop.send_replace(true);
    }

    /// Waits for Shutdown.
    pub async fn stopped(&self) {
        let _ = self.stop.subscribe().wait_for(|stop| *stop).await;
    }

    /// Ends the machine whatever is in it: the shim is terminated by a signal.
    pub async fn abandon(&self) {
        if let Some(machine) = self.machine.lock().await.take() {
            self.launched.send_replace(None);
            machine.end().await;
        }
    }
}

fn deleted(pid: u32, exit: Exit) -> DeleteResponse {
    let exited_at = Some(timestamp(exit.at)).into();
    DeleteResponse { pid, exit_status: exit.status, exited_at, ..Default::default() }
}
