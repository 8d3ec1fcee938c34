//! Clones that wait for somebody: they stand still, and cost no processor.

use std::future::Future;
use std::io;
use std::time::Duration;

use qapi::qmp::{cont, stop};
use tokio::io::Interest;

use super::clone;
use super::connect::run_state;
use super::host::Host;
use super::machine::{Machine, missing};
use super::network::Given;
use super::{MachineError, RunError};
use crate::host::sys;
use crate::image::Image;
use crate::qmp::Monitor;
use crate::spec::Spec;
use crate::template::TemplateError;

impl Host {
    /// Starts a clone of the template that matches `spec`; it never boots.
    ///
    /// # Errors
    /// As [`Host::start`], and where no template matches.
    pub async fn start_clone(&self, spec: &Spec) -> Result<(Image, Machine), RunError> {
        let chosen = self.choose(spec)?;
        match chosen.2 {
            Some(_) => {
                self.start_chosen(spec, None, Given::default(), chosen)
                    .await
            }
            None => Err(none(spec)),
        }
    }

    /// Id of the template that machines of `spec` are cloned from; its files
    /// are read where they have changed since they were checked.
    ///
    /// # Errors
    /// None matches, or it is damaged.
    pub fn template_of(&self, spec: &Spec) -> Result<String, RunError> {
        let (_, _, template) = self.choose(spec)?;
        template.map(|found| found.id).ok_or_else(|| none(spec))
    }
}

fn none(spec: &Spec) -> RunError {
    let (image, profile) = (spec.image.clone(), spec.profile.clone());
    TemplateError::NoneFits { image, profile }.into()
}

impl Machine {
    /// Stands still until [`Machine::wake`]; its clock is set once more before,
    /// so that an emulator has translated what `wake` needs.
    ///
    /// # Errors
    /// It is no clone, its clock cannot be set within `within`, or QEMU refuses.
    pub(crate) async fn rest(&self, within: Duration) -> Result<(), MachineError> {
        let template = self.template().ok_or(missing("a template"))?;
        clone::right_clock(self.channel(), &format!("template {template}"), within).await?;
        self.disk().hold(true);
        self.monitor().execute(stop {}).await?;
        Ok(())
    }

    /// Goes on after [`Machine::rest`], its clock right to 100 ms: while it
    /// stood still, so did the clock. Its agent has answered then.
    ///
    /// # Errors
    /// It is no clone, QEMU refuses, or the clock cannot be set within `within`.
    pub(crate) async fn wake(&self, within: Duration) -> Result<(), MachineError> {
        let template = self.template().ok_or(missing("a template"))?;
        self.disk().hold(false);
        let go = async {
            self.monitor().execute(cont {}).await?;
            Ok(())
        };
        let of = format!("template {template}");
        // QEMU starts the processor while the question is on its way.
        tokio::try_join!(go, clone::right_clock(self.channel(), &of, within))?;
        Ok(())
    }

    /// The end of its VMM, watched by a descriptor of its own.
    ///
    /// # Errors
    /// No descriptor left.
    pub(crate) fn end_of_vmm(&self) -> io::Result<impl Future<Output = ()> + Send + use<>> {
        // Not waited for yet: the id cannot be another's.
        let pidfd = sys::watch(sys::pidfd_open(self.process().pid())?, Interest::READABLE)?;
        Ok(async move {
            let _ = pidfd.readable().await;
        })
    }
}

/// Whether QEMU says that a machine stands still, and nothing else is wrong.
pub(crate) async fn rests(monitor: &Monitor) -> bool {
    matches!(run_state(monitor).await.as_deref(), Ok("paused"))
}
