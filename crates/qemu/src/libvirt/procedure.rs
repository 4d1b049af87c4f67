//! What is called of libvirt's programs (`remote_protocol.x`, `qemu_protocol.x`): the numbers never change.

/// `REMOTE_PROGRAM` and `QEMU_PROGRAM`, both of version 1.
pub(super) const REMOTE: u32 = 0x2000_8086;
pub(super) const QEMU: u32 = 0x2000_8087;
pub(super) const VERSION: u32 = 1;

/// `QEMU_PROC_DOMAIN_MONITOR_EVENT`, unasked.
pub(super) const MONITOR_EVENT: u32 = 6;

/// `REMOTE_PROC_DOMAIN_EVENT_CALLBACK_LIFECYCLE`, unasked.
pub(super) const LIFECYCLE_EVENT: u32 = 318;

/// What can be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Procedure {
    /// `REMOTE_PROC_AUTH_LIST`
    AuthList,
    /// `REMOTE_PROC_AUTH_POLKIT`
    AuthPolkit,
    /// `REMOTE_PROC_CONNECT_OPEN`
    ConnectOpen,
    /// `REMOTE_PROC_CONNECT_CLOSE`
    ConnectClose,
    /// `REMOTE_PROC_CONNECT_SUPPORTS_FEATURE`
    SupportsFeature,
    /// `REMOTE_PROC_CONNECT_GET_LIB_VERSION`
    LibVersion,
    /// `REMOTE_PROC_CONNECT_GET_VERSION`
    HypervisorVersion,
    /// `REMOTE_PROC_CONNECT_LIST_ALL_DOMAINS`
    ListAllDomains,
    /// `REMOTE_PROC_DOMAIN_LOOKUP_BY_ID`
    LookupById,
    /// `REMOTE_PROC_DOMAIN_LOOKUP_BY_NAME`
    LookupByName,
    /// `REMOTE_PROC_DOMAIN_LOOKUP_BY_UUID`
    LookupByUuid,
    /// `REMOTE_PROC_DOMAIN_GET_XML_DESC`
    XmlDesc,
    /// `REMOTE_PROC_DOMAIN_GET_INFO`
    Info,
    /// `REMOTE_PROC_DOMAIN_GET_STATE`
    State,
    /// `REMOTE_PROC_DOMAIN_GET_CONTROL_INFO`
    ControlInfo,
    /// `REMOTE_PROC_CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY`
    EventRegister,
    /// `REMOTE_PROC_CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY`
    EventDeregister,
    /// `REMOTE_PROC_DOMAIN_MEMORY_PEEK`: QEMU's `pmemsave` into a file of libvirt's, which libvirt reads
    /// and removes.
    MemoryPeek,
    /// `REMOTE_PROC_DOMAIN_SUSPEND`
    Suspend,
    /// `REMOTE_PROC_DOMAIN_RESUME`
    Resume,
    /// `REMOTE_PROC_DOMAIN_CORE_DUMP_WITH_FORMAT`
    CoreDump,
    /// `REMOTE_PROC_DOMAIN_ABORT_JOB`
    AbortJob,
    /// `QEMU_PROC_DOMAIN_MONITOR_COMMAND`
    Monitor,
    /// `QEMU_PROC_DOMAIN_MONITOR_COMMAND_WITH_FILES` (libvirt 8.2)
    MonitorWithFiles,
    /// `QEMU_PROC_CONNECT_DOMAIN_MONITOR_EVENT_REGISTER`
    MonitorEventRegister,
    /// `QEMU_PROC_CONNECT_DOMAIN_MONITOR_EVENT_DEREGISTER`
    MonitorEventDeregister,
}

impl Procedure {
    /// Its name, for people.
    pub fn word(self) -> &'static str {
        match self {
            Self::AuthList => "AUTH_LIST",
            Self::AuthPolkit => "AUTH_POLKIT",
            Self::ConnectOpen => "CONNECT_OPEN",
            Self::ConnectClose => "CONNECT_CLOSE",
            Self::SupportsFeature => "CONNECT_SUPPORTS_FEATURE",
            Self::LibVersion => "CONNECT_GET_LIB_VERSION",
            Self::HypervisorVersion => "CONNECT_GET_VERSION",
            Self::ListAllDomains => "CONNECT_LIST_ALL_DOMAINS",
            Self::LookupById => "DOMAIN_LOOKUP_BY_ID",
            Self::LookupByName => "DOMAIN_LOOKUP_BY_NAME",
            Self::LookupByUuid => "DOMAIN_LOOKUP_BY_UUID",
            Self::XmlDesc => "DOMAIN_GET_XML_DESC",
            Self::Info => "DOMAIN_GET_INFO",
            Self::State => "DOMAIN_GET_STATE",
            Self::ControlInfo => "DOMAIN_GET_CONTROL_INFO",
            Self::EventRegister => "CONNECT_DOMAIN_EVENT_CALLBACK_REGISTER_ANY",
            Self::EventDeregister => "CONNECT_DOMAIN_EVENT_CALLBACK_DEREGISTER_ANY",
            Self::MemoryPeek => "DOMAIN_MEMORY_PEEK",
            Self::Suspend => "DOMAIN_SUSPEND",
            Self::Resume => "DOMAIN_RESUME",
            Self::CoreDump => "DOMAIN_CORE_DUMP_WITH_FORMAT",
            Self::AbortJob => "DOMAIN_ABORT_JOB",
            Self::Monitor => "DOMAIN_MONITOR_COMMAND",
            Self::MonitorWithFiles => "DOMAIN_MONITOR_COMMAND_WITH_FILES",
            Self::MonitorEventRegister => "CONNECT_DOMAIN_MONITOR_EVENT_REGISTER",
            Self::MonitorEventDeregister => "CONNECT_DOMAIN_MONITOR_EVENT_DEREGISTER",
        }
    }

    /// Its program and number.
    pub(super) fn number(self) -> (u32, u32) {
        match self {
            Self::AuthList => (REMOTE, 66),
            Self::AuthPolkit => (REMOTE, 70),
            Self::ConnectOpen => (REMOTE, 1),
            Self::ConnectClose => (REMOTE, 2),
            Self::SupportsFeature => (REMOTE, 60),
            Self::LibVersion => (REMOTE, 157),
            Self::HypervisorVersion => (REMOTE, 4),
            Self::ListAllDomains => (REMOTE, 273),
            Self::LookupById => (REMOTE, 22),
            Self::LookupByName => (REMOTE, 23),
            Self::LookupByUuid => (REMOTE, 24),
            Self::XmlDesc => (REMOTE, 14),
            Self::Info => (REMOTE, 16),
            Self::State => (REMOTE, 212),
            Self::ControlInfo => (REMOTE, 229),
            Self::EventRegister => (REMOTE, 316),
            Self::EventDeregister => (REMOTE, 317),
            Self::MemoryPeek => (REMOTE, 104),
            Self::Suspend => (REMOTE, 34),
            Self::Resume => (REMOTE, 28),
            Self::CoreDump => (REMOTE, 334),
            Self::AbortJob => (REMOTE, 164),
            Self::Monitor => (QEMU, 1),
            Self::MonitorWithFiles => (QEMU, 7),
            Self::MonitorEventRegister => (QEMU, 4),
            Self::MonitorEventDeregister => (QEMU, 5),
        }
    }

    /// Whether a connection that only reads may call it (libvirt's rights of such a one, `viraccessdriver*`:
    /// `getattr`, `read`, `search-domains` of a connection; `getattr`, `read` of a domain).
    pub(super) fn only_reads(self) -> bool {
        match self {
            Self::AuthList
            | Self::AuthPolkit
            | Self::ConnectOpen
            | Self::ConnectClose
            | Self::SupportsFeature
            | Self::LibVersion
            | Self::HypervisorVersion
            | Self::ListAllDomains
            | Self::LookupById
            | Self::LookupByName
            | Self::LookupByUuid
            | Self::XmlDesc
            | Self::Info
            | Self::State
            | Self::ControlInfo
            | Self::EventRegister
            | Self::EventDeregister => true,
            Self::MemoryPeek
            | Self::Suspend
            | Self::Resume
            | Self::CoreDump
            | Self::AbortJob
            | Self::Monitor
            | Self::MonitorWithFiles
            | Self::MonitorEventRegister
            | Self::MonitorEventDeregister => false,
        }
    }
}
