//! Stands in for the guest on processors this crate has no guest code for: the crate compiles, [`crate::ThreadGuest`]
//! and the devices work, and everything that needs KVM fails with [`Error::Architecture`].

use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::error::Error;
use crate::firmware::Firmware;
use crate::vcpu::{Answer, Start};

pub(crate) const CAPABILITIES: &[Cap] = &[];

#[derive(Debug)]
pub(crate) struct EntryState;

pub(crate) fn supported() -> Result<(), Error> {
    Err(Error::Architecture)
}

pub(crate) fn code() -> &'static [u8] {
    &[]
}

pub(crate) fn write_tables(_firmware: &Firmware) -> Result<(), Error> {
    Err(Error::Architecture)
}

pub(crate) fn prepare_vm(_vm: &VmFd) -> Result<(), Error> {
    Err(Error::Architecture)
}

impl EntryState {
    pub(crate) fn new(_kvm: &Kvm, _vcpu: &VcpuFd) -> Result<Self, Error> {
        Err(Error::Architecture)
    }

    pub(crate) fn enter(&self, _vcpu: &VcpuFd, _start: &Start) -> Result<(), Error> {
        Err(Error::Architecture)
    }
}

pub(crate) fn answer(_vcpu: &VcpuFd) -> Result<Answer, Error> {
    Err(Error::Architecture)
}
