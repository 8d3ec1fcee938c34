//! The options of every verb that makes a machine, and how their values are read.

use std::path::PathBuf;

use serde::de::DeserializeOwned;

use crate::spec::{
    Accel, Bridge, Bytes, ChannelKind, DomainName, Exception, HostPattern, LabelName, LsmLabel,
    MachineType, NetworkName, Port, ProfileName, Publish, Request, Survivors, Timeout, Waived,
    WorkspaceMode,
};

/// What the machine is made of, and what runs in it without being told otherwise.
#[derive(Debug, clap::Args)]
pub(super) struct MachineArgs {
    /// Image to run in [default: default].
    #[arg(long, short)]
    image: Option<String>,
    /// Kernel other than the image's: a name such as `tuned`, or a path.
    #[arg(long, value_name = "NAME|PATH")]
    kernel: Option<String>,
    /// Set of limits [default: standard].
    #[arg(long, short, value_name = "NAME")]
    profile: Option<ProfileName>,
    /// Virtual CPUs [default: the profile's].
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Guest memory, such as 512M or 2G [default: the profile's].
    #[arg(long, short, value_name = "SIZE")]
    memory: Option<Bytes>,
    /// Size of the writable disk [default: the profile's].
    #[arg(long, value_name = "SIZE")]
    disk: Option<Bytes>,
    /// How long the command may run, such as 90s or 5m [default: the profile's].
    #[arg(long, value_name = "TIME")]
    timeout: Option<Timeout>,
    /// What the machine can reach, never the host or a LAN: dev (any public host at the ports of a developer),
    /// packages, llm-only, offline (only hosts that are allowed by name), open (at any port),
    /// isolated (no network at all), or a network of the configuration [default: nat-filtered, which is dev].
    #[arg(long, value_name = "NAME")]
    network: Option<NetworkName>,
    /// Instead, a bridge or a tap of this host, and the machine's address and gateway there:
    /// br0:192.0.2.50/24@192.0.2.1. Advanced: what can be reached there is not filtered, it only
    /// cannot take another's address. IPv4 alone, and no DHCP.
    #[arg(
        long,
        value_name = "BRIDGE:ADDRESS/PREFIX@GATEWAY",
        conflicts_with = "network"
    )]
    bridge: Option<Bridge>,
    /// A host that may be reached besides those of the network: example.org, *.example.org,
    /// example.org:8443. To allow only some, begin with --network offline.
    #[arg(long = "allow-host", value_name = "HOST[:PORT]")]
    allow_hosts: Vec<HostPattern>,
    /// A host that may not be reached, whatever else allows it.
    #[arg(long = "deny-host", value_name = "HOST")]
    deny_hosts: Vec<HostPattern>,
    /// Read the name in every connection to ports 80 and 443, and hold it to the hosts that may be
    /// reached: an address that they share with others opens no others.
    #[arg(long)]
    strict: bool,
    /// A port, or several, that may be reached besides those of the network: 8443, 8000-8100, 4433/udp.
    #[arg(long = "allow-port", value_name = "PORT")]
    allow_ports: Vec<Port>,
    /// Addresses that may be reached although they are private: 10.1.2.3/32:5432.
    #[arg(long = "allow-cidr", value_name = "CIDR[:PORT]")]
    allow_cidrs: Vec<Exception>,
    /// With IPv6, filtered as IPv4 is.
    #[arg(long)]
    ipv6: bool,
    /// A port of this host that leads to one on the guest's loopback, over the guest channel: 8080:80,
    /// 127.0.0.1:8080:80. Without an address only this host can reach it.
    #[arg(long, value_name = "[ADDRESS:]PORT[:GUEST-PORT]")]
    publish: Vec<Publish>,
    /// kvm, or tcg: software emulation, slow and no isolation by hardware [default: kvm].
    #[arg(long, value_parser = word::<Accel>)]
    accel: Option<Accel>,
    /// Machine type: microvm or q35 [default: microvm].
    #[arg(long, value_name = "TYPE", value_parser = word::<MachineType>)]
    machine: Option<MachineType>,
    /// How the guest agent is reached: auto, vsock or serial [default: auto].
    #[arg(long, value_name = "KIND", value_parser = word::<ChannelKind>)]
    channel: Option<ChannelKind>,
    /// Let the guest run virtual machines of its own: more of the host's kernel to attack.
    #[arg(long)]
    nested: bool,
    /// Boot, also where a template could be cloned.
    #[arg(long)]
    cold: bool,
    /// Clone this template; it must match [default: any that does].
    #[arg(long, value_name = "ID", conflicts_with = "cold")]
    template: Option<String>,
    /// Trust domain: templates are cloned within one only [default: default].
    #[arg(long, value_name = "NAME")]
    domain: Option<DomainName>,
    /// Do without a layer of the jail: user, files, namespaces, seccomp,
    /// landlock, cgroup or lsm. The outcome and `bulkhead verify` say so.
    #[arg(long, value_name = "LAYER", value_delimiter = ',')]
    waive: Vec<Waived>,
    /// AppArmor profile or SELinux context that QEMU is started in [default: the
    /// profile of `doctor --apparmor-profile`, where it is loaded].
    #[arg(long, value_name = "LABEL")]
    lsm_label: Option<LsmLabel>,
    /// Set NAME=VALUE in the command's environment, or pass NAME on.
    #[arg(long, short, value_name = "NAME[=VALUE]", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Label to find the machine by.
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = label)]
    labels: Vec<(LabelName, String)>,
    /// Working directory in the guest [default: /workspace/work].
    #[arg(long, value_name = "DIR")]
    workdir: Option<String>,
    /// User in the guest: a name, a number, or root [default: agent].
    #[arg(long, short)]
    user: Option<String>,
    /// Take everything not given here from a TOML file.
    #[arg(long, value_name = "FILE")]
    pub(super) spec: Option<PathBuf>,
}

impl MachineArgs {
    /// What the options ask for, without the file named by `--spec`.
    pub(super) fn request(self) -> Request {
        Request {
            image: self.image,
            kernel: self.kernel,
            profile: self.profile,
            cpus: self.cpus,
            memory: self.memory,
            disk: self.disk,
            timeout: self.timeout,
            network: self.network,
            bridge: self.bridge,
            allow_hosts: self.allow_hosts.into_iter().collect(),
            deny_hosts: self.deny_hosts.into_iter().collect(),
            strict: self.strict.then_some(true),
            allow_ports: self.allow_ports.into_iter().collect(),
            allow_cidrs: self.allow_cidrs.into_iter().collect(),
            ipv6: self.ipv6.then_some(true),
            publish: self.publish,
            accel: self.accel,
            machine: self.machine,
            channel: self.channel,
            nested: self.nested.then_some(true),
            cold: self.cold.then_some(true),
            template: self.template,
            domain: self.domain,
            waive: self.waive.into_iter().reduce(|mut all, one| {
                all.extend(&one);
                all
            }),
            lsm_label: self.lsm_label,
            env: self.env.into_iter().collect(),
            labels: self.labels.into_iter().collect(),
            workdir: self.workdir,
            user: self.user,
            ..Request::default()
        }
    }
}

/// How long a machine lives that outlives its command.
#[derive(Debug, clap::Args)]
pub(super) struct LifetimeArgs {
    /// Stop the machine so long after its start, such as 8h [default: never].
    #[arg(long, value_name = "TIME")]
    ttl: Option<Timeout>,
    /// Stop it when nothing happened in it for so long [default: never].
    #[arg(long, value_name = "TIME")]
    idle_timeout: Option<Timeout>,
    /// What happens to it when its supervisor dies: kill or adopt [default: kill].
    #[arg(long, value_name = "WHAT", value_parser = word::<Survivors>)]
    survivors: Option<Survivors>,
    /// How long the guest may take to power off [default: 10s].
    #[arg(long, value_name = "TIME")]
    stop_grace: Option<Timeout>,
}

impl LifetimeArgs {
    /// `request` with these options.
    pub(super) fn into_request(self, request: Request) -> Request {
        Request {
            ttl: self.ttl,
            idle_timeout: self.idle_timeout,
            survivors: self.survivors,
            stop_grace: self.stop_grace,
            ..request
        }
    }
}

/// The host directory that is exchanged.
#[derive(Debug, clap::Args)]
pub(super) struct WorkspaceArgs {
    /// Directory to work on in the guest, at /workspace/work.
    #[arg(long, short, value_name = "DIR")]
    workspace: Option<PathBuf>,
    /// copy (nothing on the host changes unless asked), share (live; `share:ro`
    /// cannot be written) or none [default: copy].
    #[arg(long, value_name = "MODE", value_parser = share_mode)]
    workspace_mode: Option<(WorkspaceMode, bool)>,
}

impl WorkspaceArgs {
    /// `request` with these options.
    pub(super) fn into_request(self, request: Request) -> Request {
        let (workspace_mode, read_only) = self.workspace_mode.unzip();
        Request {
            workspace: self.workspace,
            workspace_mode,
            read_only: read_only.filter(|yes| *yes),
            ..request
        }
    }
}

/// Parses a word as the configuration file does, so that the two agree.
pub(super) fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    use serde::de::IntoDeserializer;
    let text: serde::de::value::StrDeserializer<'_, serde::de::value::Error> =
        text.into_deserializer();
    T::deserialize(text).map_err(|error| error.to_string())
}

fn share_mode(text: &str) -> Result<(WorkspaceMode, bool), String> {
    match text.strip_suffix(":ro") {
        Some(mode) => Ok((word(mode)?, true)),
        None => Ok((word(text)?, false)),
    }
}

/// Parses `NAME=VALUE`, or takes the value of NAME here.
pub(super) fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) => Ok((name.into(), value.into())),
        None => std::env::var(text)
            .map(|value| (text.into(), value))
            .map_err(|_| format!("{text} is not set here; give it as {text}=VALUE")),
    }
}

/// Parses `NAME=VALUE`.
pub(super) fn label(text: &str) -> Result<(LabelName, String), String> {
    let (name, value) = text
        .split_once('=')
        .ok_or_else(|| format!("give it as {text}=VALUE"))?;
    let name = name.parse().map_err(|error| format!("{error}"))?;
    Ok((name, value.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;
    use crate::spec::{Config, Layer, MACHINE_KEYS, Spec, merge};

    #[derive(clap::Parser)]
    struct All {
        #[command(flatten)]
        machine: MachineArgs,
        #[command(flatten)]
        lifetime: LifetimeArgs,
    }

    /// Every key of `[machine]`: as a file has it, and as it is typed.
    const SAME: [(&str, &[&str]); 21] = [
        ("image = \"i\"", &["--image", "i"]),
        ("kernel = \"tuned\"", &["--kernel", "tuned"]),
        ("profile = \"light\"", &["--profile", "light"]),
        ("cpus = 3", &["--cpus", "3"]),
        ("memory = \"3G\"", &["--memory", "3072M"]),
        ("disk = \"30G\"", &["--disk", "30G"]),
        ("timeout = \"2m\"", &["--timeout", "120s"]),
        ("ttl = \"2h\"", &["--ttl", "120m"]),
        ("idle_timeout = \"5m\"", &["--idle-timeout", "5m"]),
        ("survivors = \"adopt\"", &["--survivors", "adopt"]),
        ("stop_grace = \"3s\"", &["--stop-grace", "3"]),
        ("network = \"off\"", &["--network", "off"]),
        ("accel = \"tcg\"", &["--accel", "tcg"]),
        ("machine = \"q35\"", &["--machine", "q35"]),
        ("channel = \"serial\"", &["--channel", "serial"]),
        ("waive = \"seccomp,user\"", &["--waive", "user,seccomp"]),
        ("lsm_label = \"a_t:s0\"", &["--lsm-label", "a_t:s0"]),
        ("user = \"u\"", &["--user", "u"]),
        ("workdir = \"/w\"", &["--workdir", "/w"]),
        (
            "env = { A = \"1\", B = \"=\" }",
            &["--env", "A=1", "-e", "B=="],
        ),
        ("labels = { \"a/b\" = \"c\" }", &["--label", "a/b=c"]),
    ];

    /// The spec of a layer, with a network defined below it.
    fn spec(layer: Layer) -> Spec {
        let below = "[network.off]\nmode = \"isolated\"\n";
        let below = Layer::file(Path::new("below.toml"), below).unwrap();
        let mut merged = merge(&[below, layer]).unwrap();
        merged.config.machine.name = Some("vm".parse().unwrap());
        merged.resolve_machine().unwrap()
    }

    fn typed(words: &[&str]) -> Spec {
        let All { machine, lifetime } =
            All::try_parse_from([&["bulkhead"], words].concat()).unwrap();
        spec(Layer::flags(Config {
            machine: lifetime.into_request(machine.request()),
            ..Config::default()
        }))
    }

    fn filed(keys: &str) -> Spec {
        let text = format!("[machine]\n{keys}\n");
        spec(Layer::file(Path::new("config.toml"), &text).unwrap())
    }

    #[test]
    fn flags_and_files_give_the_same_spec() {
        let nothing = typed(&[]);
        for ((key, words), name) in SAME.into_iter().zip(MACHINE_KEYS) {
            assert!(
                key.starts_with(&format!("{name} = ")),
                "{key} is not {name}"
            );
            assert_eq!(filed(key), typed(words), "{key}");
            assert!(filed(key) != nothing, "{key}");
        }
        let keys = SAME.map(|(key, _)| key).join("\n");
        let words: Vec<&str> = SAME.iter().flat_map(|(_, words)| *words).copied().collect();
        assert_eq!(filed(&keys), typed(&words));
    }

    #[test]
    fn words_are_read_as_in_files() {
        assert_eq!(word("tcg"), Ok(Accel::Tcg));
        assert!(word::<Accel>("TCG").unwrap_err().contains("kvm"));
        assert_eq!(share_mode("share:ro"), Ok((WorkspaceMode::Share, true)));
        assert_eq!(share_mode("copy"), Ok((WorkspaceMode::Copy, false)));
        assert!(share_mode("share:rw").is_err());
    }

    #[test]
    fn pairs_are_split_at_the_first_equals_sign() {
        let owned = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(variable("A=b=c"), Ok(owned("A", "b=c")));
        assert!(
            variable("BULKHEAD_NOT_SET")
                .unwrap_err()
                .contains("not set here")
        );
        assert_eq!(label("team=a=b").unwrap().1, "a=b");
        assert!(label("team").is_err() && label("a b=c").is_err());
    }
}
